/* Products of codes of 8 bits, summed exactly in 32 bits, for processors whose own products of bytes clip.
 *
 * found[r, c] = sum over k of given[r, k] codes[c, k]. given holds codes of 8 bits in 16, so that pairs of products are
 * added in 32 bits by one instruction (vpmaddwd); at most 2^17 inputs, so that no sum overflows. */
#include "threads.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif

enum { TILE = 64, ROWS = 4, CHANNELS = 3 };

typedef struct {
    const int16_t *given;
    const int8_t *codes;
    float *found;
    int64_t rows, inputs, channels;
} product_t;

static inline int32_t rest(const int16_t *given, const int8_t *codes, int64_t from, int64_t inputs) {
    int32_t sum = 0;
    for (int64_t k = from; k < inputs; k++)
        sum += (int32_t)given[k] * codes[k];
    return sum;
}

#ifdef __AVX2__
static inline int32_t summed(__m256i lanes) {
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256(lanes, 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}

/* A few rows by a few channels, whose sums stay in registers. */
static inline __attribute__((always_inline)) void few(const product_t *job, int64_t row, int64_t channel,
                                                       const int rows, const int channels) {
    __m256i sums[ROWS][ROWS];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int c = 0; c < channels; c++)
            sums[r][c] = _mm256_setzero_si256();
    const int16_t *given = job->given + row * job->inputs;
    const int8_t *codes = job->codes + channel * job->inputs;
    const int64_t whole = job->inputs / 16 * 16;
    for (int64_t k = 0; k < whole; k += 16) {
        __m256i wide[ROWS];
#pragma GCC unroll 4
        for (int c = 0; c < channels; c++)
            wide[c] = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(codes + c * job->inputs + k)));
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            const __m256i one = _mm256_loadu_si256((const __m256i *)(given + r * job->inputs + k));
#pragma GCC unroll 4
            for (int c = 0; c < channels; c++)
                sums[r][c] = _mm256_add_epi32(sums[r][c], _mm256_madd_epi16(one, wide[c]));
        }
    }
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < channels; c++)
            job->found[(row + r) * job->channels + channel + c] =
                (float)(summed(sums[r][c]) + rest(given + r * job->inputs, codes + c * job->inputs, whole, job->inputs));
}
#else
static inline void few(const product_t *job, int64_t row, int64_t channel, const int rows, const int channels) {
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < channels; c++)
            job->found[(row + r) * job->channels + channel + c] = (float)rest(
                job->given + (row + r) * job->inputs, job->codes + (channel + c) * job->inputs, 0, job->inputs);
}
#endif

static void some_channels(const void *work, int64_t thread, int64_t from, int64_t to) {
    const product_t *job = work;
    (void)thread;
    for (int64_t tile = 0; tile < job->rows; tile += TILE) {
        const int64_t end = tile + TILE < job->rows ? tile + TILE : job->rows;
        int64_t channel = from;
        if (end - tile == 1)
            for (; channel + ROWS <= to; channel += ROWS)
                few(job, tile, channel, 1, ROWS);
        for (; channel + CHANNELS <= to; channel += CHANNELS) {
            int64_t row = tile;
            for (; row + ROWS <= end; row += ROWS)
                few(job, row, channel, ROWS, CHANNELS);
            for (; row < end; row++)
                few(job, row, channel, 1, CHANNELS);
        }
        for (; channel < to; channel++)
            for (int64_t row = tile; row < end; row++)
                few(job, row, channel, 1, 1);
    }
}

void int8_product(const int16_t *given, const int8_t *codes, float *found, int64_t rows, int64_t inputs,
                  int64_t channels, int64_t threads) {
    const product_t job = {given, codes, found, rows, inputs, channels};
    in_threads(some_channels, &job, channels, rows * inputs * channels < ((int64_t)1 << 22) ? 1 : threads);
}

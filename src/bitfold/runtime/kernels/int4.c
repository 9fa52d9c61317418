/* Codes of 4 bits, as PyTorch packs them for its 4-bit product, to the weights that they stand for.
 *
 * Packed: blocks of 64 channels (with AVX-512; of 32 with AVX2), each [in, block / 2] bytes; byte i of an input has
 * channel i in its lower and channel block / 2 + i in its upper half. A weight is (c - 8 - zero) scale, rounded once to
 * bfloat16: the difference and its product with 8 bits of a scale are exact in float32. Out: [in, channels] in bfloat16,
 * or in float32 with the same values, for processors whose products are in float32. */
#include <string.h>

#include "threads.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif

typedef struct {
    const uint8_t *packed;
    const uint16_t *scales; /* [groups, all channels, 2], of which the first is the scale */
    const int8_t *zeros;    /* [groups, all channels], or none */
    int64_t inputs, block, group, all, at, channels;
    uint16_t *halves;
    float *numbers;
} weights_t;

/* Vectors of as many channels as a register holds: left to itself, GCC does not see them in a block of 32. */
#ifdef __AVX512F__
enum { LANES = 16 };
#else
enum { LANES = 8 };
#endif
typedef uint8_t bytes_t __attribute__((vector_size(LANES)));
typedef int8_t signed_t __attribute__((vector_size(LANES)));
typedef uint16_t halves_t __attribute__((vector_size(2 * LANES)));
typedef int32_t integers_t __attribute__((vector_size(4 * LANES)));
typedef uint32_t bits_t __attribute__((vector_size(4 * LANES)));
typedef float numbers_t __attribute__((vector_size(4 * LANES)));

/* GCC 12 converts between widths one number at a time; the instructions are there. */
static inline integers_t widened(const uint8_t *bytes) {
#if defined(__AVX512F__)
    return (integers_t)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)bytes));
#elif defined(__AVX2__)
    return (integers_t)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)bytes));
#else
    bytes_t found;
    memcpy(&found, bytes, sizeof found);
    return __builtin_convertvector(found, integers_t);
#endif
}

static inline halves_t upper_half(bits_t bits) {
    bits >>= 16;
#if defined(__AVX512F__)
    return (halves_t)_mm512_cvtepi32_epi16((__m512i)bits);
#elif defined(__AVX2__)
    return (halves_t)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)bits), _mm256_extracti128_si256((__m256i)bits, 1));
#else
    return __builtin_convertvector(bits, halves_t);
#endif
}

/* Codes less the middle times the scale, as the nearest bfloat16, ties to even, in the upper half of 32 bits. */
static inline bits_t weights_of(integers_t codes, integers_t middle, numbers_t scale) {
    const bits_t bits = (bits_t)(__builtin_convertvector(codes - middle, numbers_t) * scale);
    return bits + 0x7fff + (bits >> 16 & 1);
}

static inline void put(const weights_t *job, int64_t at, bits_t found) {
    if (job->numbers) {
        found &= 0xffff0000u;
        memcpy(job->numbers + at, &found, sizeof found);
    } else {
        const halves_t halves = upper_half(found);
        memcpy(job->halves + at, &halves, sizeof halves);
    }
}

static inline __attribute__((always_inline)) void one_block(const weights_t *job, int64_t block, const int half) {
    enum { MOST = 64 / LANES };
    const int vectors = half / LANES; /* of either half of a block */
    const int64_t first = block * 2 * half, stride = job->channels;
    const uint8_t *bytes = job->packed + (job->at + first) * (job->inputs / 2);
    for (int64_t group = 0; group < job->inputs / job->group; group++) {
        const int64_t channel = group * job->all + job->at + first;
        numbers_t scale[MOST];
        integers_t middle[MOST];
        for (int v = 0; v < 2 * vectors; v++) {
            bits_t bits; /* the scale below, what is of no interest here above */
            memcpy(&bits, job->scales + 2 * (channel + v * LANES), sizeof bits);
            scale[v] = (numbers_t)(bits << 16);
            middle[v] = (integers_t){0} + 8;
            if (job->zeros) {
                signed_t zeros;
                memcpy(&zeros, job->zeros + channel + v * LANES, sizeof zeros);
                middle[v] += __builtin_convertvector(zeros, integers_t);
            }
        }
        for (int64_t k = group * job->group; k < (group + 1) * job->group; k++) {
            for (int v = 0; v < vectors; v++) {
                const integers_t codes = widened(bytes + k * half + v * LANES);
                const int64_t at = k * stride + first + v * LANES;
                put(job, at, weights_of(codes & 15, middle[v], scale[v]));
                put(job, at + half, weights_of(codes >> 4, middle[vectors + v], scale[vectors + v]));
            }
        }
    }
}

static void blocks(const void *given, int64_t thread, int64_t from, int64_t to) {
    const weights_t *job = given;
    (void)thread;
    for (int64_t block = from; block < to; block++) {
        if (job->block == 64)
            one_block(job, block, 32);
        else
            one_block(job, block, 16);
    }
}

/* `channels` channels from `at` on, both multiples of `block`, which is 32 or 64. */
void int4_weights(const uint8_t *packed, const uint16_t *scales, const int8_t *zeros, int64_t inputs, int64_t block,
                  int64_t group, int64_t all, int64_t at, int64_t channels, uint16_t *halves, float *numbers,
                  int64_t threads) {
    const weights_t job = {packed, scales, zeros, inputs, block, group, all, at, channels, halves, numbers};
    in_threads(blocks, &job, channels / block, inputs * channels < ((int64_t)1 << 20) ? 1 : threads);
}

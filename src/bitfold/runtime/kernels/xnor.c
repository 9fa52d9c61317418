/* Products of signs: rows of bits, 1 where a number is negative, a xor b, and counts of what differs.
 *
 * Words: [rows, words] of 64 bits, element 64 w + i of a row is bit i of its word w; bits beyond a row's end are 0 on
 * both sides, differ nowhere, and so count nothing:  a · b = k - 2 popcount(a xor b).
 *
 * The right side is arranged in panels of channels first, so that a vector holds channels and sums need no adding up
 * across a vector:
 *   - With AVX-512 VPOPCNTDQ, and in plain C, a panel is [words][32 channels] words.
 *   - With AVX2, which has no instruction that counts bits, a shuffle looks them up: a nibble of the left side chooses
 *     one of 16 tables, whose entry for a nibble of the right is how many of 4 bits differ, for 32 channels at a time.
 *     A panel is [words · 16 nibbles][32 bytes] with channel i in the lower and 32 + i in the upper half of byte i.
 */
#include <string.h>

#include "threads.h"

#if defined(__AVX512VPOPCNTDQ__) && defined(__AVX512F__) && !defined(BITFOLD_PLAIN)
#define BY_COUNTING 1
#elif defined(__AVX2__) && !defined(BITFOLD_PLAIN)
#define BY_LOOKING_UP 1
#endif
#if defined(BY_COUNTING) || defined(BY_LOOKING_UP)
#include <immintrin.h>
#endif

#ifdef BY_LOOKING_UP
enum { PANEL = 64, ROWS = 4 };
#else
enum { PANEL = 32, ROWS = 4 };
#endif
/* Rows that a task takes through a panel. */
enum { CHUNK = 64 };
/* Fewer bit products than this are not worth starting threads for. */
#define WORTH_THREADS ((int64_t)1 << 26)

static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

const char *xnor_way(void) {
#if defined(BY_COUNTING)
    return "AVX-512 VPOPCNTDQ";
#elif defined(BY_LOOKING_UP)
    return "AVX2";
#else
    return "plain C";
#endif
}

/* -- packing ------------------------------------------------------------------------------------------------------ */

enum { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

static inline uint64_t word_of_float(const float *x) {
    uint64_t word = 0;
#if defined(BY_COUNTING)
    for (int i = 0; i < 4; i++)
        word |= (uint64_t)_mm512_cmp_ps_mask(_mm512_loadu_ps(x + 16 * i), _mm512_setzero_ps(), _CMP_LT_OQ) << (16 * i);
#elif defined(BY_LOOKING_UP)
    for (int i = 0; i < 8; i++) {
        __m256 less = _mm256_cmp_ps(_mm256_loadu_ps(x + 8 * i), _mm256_setzero_ps(), _CMP_LT_OQ);
        word |= (uint64_t)(uint32_t)_mm256_movemask_ps(less) << (8 * i);
    }
#else
    for (int i = 0; i < 64; i++) word |= (uint64_t)(x[i] < 0) << i;
#endif
    return word;
}

/* Of 16 bits: the sign's bit, but not of -0 (0x8000) and not of what is no number (beyond minus infinity). */
static inline uint64_t word_of_half(const uint16_t *x, uint16_t minus_infinity) {
    uint64_t word = 0;
#if defined(BY_LOOKING_UP)
    const __m256i zero = _mm256_set1_epi16((short)0x8000);
    /* As signed numbers negative ones go up from 0x8000, that is -0, to minus infinity. */
    const __m256i last = _mm256_set1_epi16((short)(minus_infinity + 1));
    for (int i = 0; i < 4; i += 2) {
        __m256i a = _mm256_loadu_si256((const __m256i *)(x + 16 * i));
        __m256i b = _mm256_loadu_si256((const __m256i *)(x + 16 * i + 16));
        a = _mm256_and_si256(_mm256_cmpgt_epi16(a, zero), _mm256_cmpgt_epi16(last, a));
        b = _mm256_and_si256(_mm256_cmpgt_epi16(b, zero), _mm256_cmpgt_epi16(last, b));
        __m256i both = _mm256_permute4x64_epi64(_mm256_packs_epi16(a, b), 0xd8);
        word |= (uint64_t)(uint32_t)_mm256_movemask_epi8(both) << (16 * i);
    }
#else
    for (int i = 0; i < 64; i++) word |= (uint64_t)(x[i] > 0x8000 && x[i] <= minus_infinity) << i;
#endif
    return word;
}

typedef struct {
    const char *x;
    int64_t kind, columns, stride, words;
    uint64_t *out;
} packing_t;

static void pack_rows(const void *given, int64_t thread, int64_t from, int64_t to) {
    const packing_t *job = given;
    (void)thread;
    const int64_t whole = job->columns / 64, rest = job->columns % 64;
    const uint16_t minus_infinity = job->kind == BFLOAT16 ? 0xff80 : 0xfc00;
    for (int64_t row = from; row < to; row++) {
        uint64_t *out = job->out + row * job->words;
        if (job->kind == FLOAT32) {
            const float *x = (const float *)job->x + row * job->stride;
            for (int64_t w = 0; w < whole; w++) out[w] = word_of_float(x + 64 * w);
            if (rest) {
                float last[64] = {0};
                memcpy(last, x + 64 * whole, rest * sizeof(float));
                out[whole] = word_of_float(last);
            }
        } else {
            const uint16_t *x = (const uint16_t *)job->x + row * job->stride;
            for (int64_t w = 0; w < whole; w++) out[w] = word_of_half(x + 64 * w, minus_infinity);
            if (rest) {
                uint16_t last[64] = {0};
                memcpy(last, x + 64 * whole, rest * sizeof(uint16_t));
                out[whole] = word_of_half(last, minus_infinity);
            }
        }
    }
}

/* Rows [rows, columns] of numbers, their elements side by side and `stride` numbers from row to row, to words. */
void xnor_pack(const void *x, int64_t kind, int64_t rows, int64_t columns, int64_t stride, uint64_t *out,
               int64_t threads) {
    packing_t job = {x, kind, columns, stride, ceil_div(columns, 64), out};
    in_threads(pack_rows, &job, rows, rows * columns < ((int64_t)1 << 20) ? 1 : threads);
}

/* -- panels ------------------------------------------------------------------------------------------------------- */

int64_t xnor_panel(void) { return PANEL; }

/* Words [rows, words] to panels: ceil(rows / PANEL) · PANEL · words words; channels beyond the last are all 0. */
void xnor_arrange(const uint64_t *words, int64_t rows, int64_t count, uint64_t *out) {
    for (int64_t panel = 0; panel < ceil_div(rows, PANEL); panel++) {
        for (int64_t w = 0; w < count; w++) {
            uint64_t found[PANEL];
            for (int c = 0; c < PANEL; c++) {
                int64_t row = panel * PANEL + c;
                found[c] = row < rows ? words[row * count + w] : 0;
            }
            uint64_t *into = out + (panel * count + w) * PANEL;
#ifdef BY_LOOKING_UP
            uint8_t *bytes = (uint8_t *)into;
            for (int nibble = 0; nibble < 16; nibble++)
                for (int c = 0; c < 32; c++) {
                    uint64_t low = found[c] >> (4 * nibble) & 15, high = found[c + 32] >> (4 * nibble) & 15;
                    bytes[32 * nibble + c] = (uint8_t)(low | high << 4);
                }
#else
            memcpy(into, found, sizeof found);
#endif
        }
    }
}

/* -- the product -------------------------------------------------------------------------------------------------- */

typedef struct {
    const uint64_t *left, *panels;
    int64_t rows, columns, words, bits, panel_count;
    int32_t *integers;
    float *numbers;
    const float *of_column, *of_row, *bias;
    uint8_t *scratch;
} product_t;

/* How many bits differ, for `rows` (at most ROWS) rows and the channels of a panel. */
#if defined(BY_LOOKING_UP)

/* Table v has at i how many bits of i differ from v; in rows of 16 bytes. */
static uint8_t differ[16][16] __attribute__((aligned(64)));

__attribute__((constructor)) static void fill(void) {
    for (int v = 0; v < 16; v++)
        for (int i = 0; i < 16; i++) differ[v][i] = (uint8_t)__builtin_popcount(v ^ i);
}

/* Bytes hold 255: 3 words are 48 nibbles of at most 4. Halves of words hold 65535: 1023 words. */
enum { WORDS_OF_BYTES = 3, WORDS_OF_SHORTS = 1023 };

/* Adds up `steps` nibbles of one row, or of four. Apart, so that all sums stay in registers. */
/* In place: GCC moves the sums from register to register otherwise, which takes a third of the time. */
#define ADD(sum, more) __asm__("vpaddb %1, %0, %0" : "+x"(sum) : "x"(more));
#define BEGIN(r) __m256i low##r = _mm256_setzero_si256(), high##r = low##r;
#define TAKE(r)                                                                          \
    {                                                                                    \
        const uint8_t *table = (const uint8_t *)differ + at##r[j];                       \
        const __m256i t = _mm256_broadcastsi128_si256(*(const __m128i *)table);          \
        ADD(low##r, _mm256_shuffle_epi8(t, a))                                           \
        ADD(high##r, _mm256_shuffle_epi8(t, b))                                          \
    }
#define READ                                                                             \
    const __m256i both = _mm256_loadu_si256((const __m256i *)(codes + 32 * j));          \
    const __m256i a = _mm256_and_si256(both, nibble);                                    \
    const __m256i b = _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble);

static __attribute__((noinline)) void add_row(const uint8_t *codes, const uint8_t *at0, int64_t steps,
                                              __m256i out[2]) {
    const __m256i nibble = _mm256_set1_epi8(15);
    BEGIN(0)
    for (int64_t j = 0; j < steps; j++) {
        READ
        TAKE(0)
    }
    out[0] = low0, out[1] = high0;
}

static __attribute__((noinline)) void add_rows(const uint8_t *codes, const uint8_t *at0, const uint8_t *at1,
                                               const uint8_t *at2, const uint8_t *at3, int64_t steps,
                                               __m256i out[8]) {
    const __m256i nibble = _mm256_set1_epi8(15);
    BEGIN(0) BEGIN(1) BEGIN(2) BEGIN(3)
    for (int64_t j = 0; j < steps; j++) {
        READ
        TAKE(0) TAKE(1) TAKE(2) TAKE(3)
    }
    out[0] = low0, out[1] = high0, out[2] = low1, out[3] = high1;
    out[4] = low2, out[5] = high2, out[6] = low3, out[7] = high3;
}

static inline void keep(__m256i *sums, __m256i bytes) {
    const __m256i zero = _mm256_setzero_si256();
    sums[0] = _mm256_add_epi16(sums[0], _mm256_unpacklo_epi8(bytes, zero));
    sums[1] = _mm256_add_epi16(sums[1], _mm256_unpackhi_epi8(bytes, zero));
}

static void count(const uint8_t *const *offsets, int rows, const uint64_t *panel, int64_t words,
                  int32_t found[ROWS][PANEL]) {
    memset(found, 0, sizeof(int32_t) * ROWS * PANEL);
    for (int64_t begin = 0; begin < words; begin += WORDS_OF_SHORTS) {
        int64_t end = begin + WORDS_OF_SHORTS < words ? begin + WORDS_OF_SHORTS : words;
        __m256i sums[ROWS][4];
        memset(sums, 0, sizeof sums);
        for (int64_t w = begin; w < end; w += WORDS_OF_BYTES) {
            const int64_t steps = 16 * (w + WORDS_OF_BYTES < end ? WORDS_OF_BYTES : end - w);
            const uint8_t *codes = (const uint8_t *)panel + 512 * w;
            __m256i bytes[2 * ROWS];
            if (rows == 1)
                add_row(codes, offsets[0] + 16 * w, steps, bytes);
            else
                add_rows(codes, offsets[0] + 16 * w, offsets[1] + 16 * w, offsets[2] + 16 * w, offsets[3] + 16 * w,
                         steps, bytes);
            for (int r = 0; r < rows; r++) {
                keep(sums[r], bytes[2 * r]);
                keep(sums[r] + 2, bytes[2 * r + 1]);
            }
        }
        for (int r = 0; r < rows; r++)
            for (int half = 0; half < 2; half++) {
                /* Unpacking leaves channels 0-7, 16-23 in the first and 8-15, 24-31 in the second. */
                uint16_t first[16], second[16];
                memcpy(first, &sums[r][2 * half], sizeof first);
                memcpy(second, &sums[r][2 * half + 1], sizeof second);
                for (int c = 0; c < 8; c++) {
                    found[r][32 * half + c] += first[c];
                    found[r][32 * half + 8 + c] += second[c];
                    found[r][32 * half + 16 + c] += first[8 + c];
                    found[r][32 * half + 24 + c] += second[8 + c];
                }
            }
    }
}

#elif defined(BY_COUNTING)

static void count(const uint64_t *const *rows_at, int rows, const uint64_t *panel, int64_t words,
                  int32_t found[ROWS][PANEL]) {
    __m512i sums[ROWS][4];
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < 4; v++) sums[r][v] = _mm512_setzero_si512();
    if (rows == 1) {
        for (int64_t w = 0; w < words; w++) {
            const __m512i a = _mm512_set1_epi64((long long)rows_at[0][w]);
            for (int v = 0; v < 4; v++) {
                const __m512i b = _mm512_loadu_si512(panel + w * PANEL + 8 * v);
                sums[0][v] = _mm512_add_epi64(sums[0][v], _mm512_popcnt_epi64(_mm512_xor_si512(a, b)));
            }
        }
        for (int v = 0; v < 4; v++)
            _mm256_storeu_si256((__m256i *)(found[0] + 8 * v), _mm512_cvtepi64_epi32(sums[0][v]));
        return;
    }
    for (int64_t w = 0; w < words; w++) {
        __m512i b[4];
        for (int v = 0; v < 4; v++) b[v] = _mm512_loadu_si512(panel + w * PANEL + 8 * v);
        for (int r = 0; r < ROWS; r++) {
            const __m512i a = _mm512_set1_epi64((long long)rows_at[r][w]);
            for (int v = 0; v < 4; v++)
                sums[r][v] = _mm512_add_epi64(sums[r][v], _mm512_popcnt_epi64(_mm512_xor_si512(a, b[v])));
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < 4; v++)
            _mm256_storeu_si256((__m256i *)(found[r] + 8 * v), _mm512_cvtepi64_epi32(sums[r][v]));
}

#else

static void count(const uint64_t *const *rows_at, int rows, const uint64_t *panel, int64_t words,
                  int32_t found[ROWS][PANEL]) {
    for (int r = 0; r < rows; r++) {
        uint64_t sums[PANEL] = {0};
        for (int64_t w = 0; w < words; w++) {
            const uint64_t a = rows_at[r][w];
            for (int c = 0; c < PANEL; c++)
                sums[c] += (uint64_t)__builtin_popcountll(a ^ panel[w * PANEL + c]);
        }
        for (int c = 0; c < PANEL; c++) found[r][c] = (int32_t)sums[c];
    }
}

#endif

static void write_row(const product_t *job, int64_t row, int64_t column, const int32_t *differing) {
    const int64_t rest = job->columns - column;
    const int width = rest < PANEL ? (int)rest : PANEL;
    const int32_t bits = (int32_t)job->bits;
    if (job->integers) {
        int32_t *out = job->integers + row * job->columns + column;
        for (int c = 0; c < width; c++) out[c] = bits - 2 * differing[c];
        return;
    }
    float *out = job->numbers + row * job->columns + column;
    for (int c = 0; c < width; c++) out[c] = (float)(bits - 2 * differing[c]);
    if (job->of_column)
        for (int c = 0; c < width; c++) out[c] *= job->of_column[column + c];
    if (job->of_row)
        for (int c = 0; c < width; c++) out[c] *= job->of_row[row];
    if (job->bias)
        for (int c = 0; c < width; c++) out[c] += job->bias[column + c];
}

/* Task t is panel t % panel_count of rows CHUNK · (t / panel_count) on. */
static void multiply(const void *given, int64_t thread, int64_t from, int64_t to) {
    const product_t *job = given;
#ifdef BY_LOOKING_UP
    /* For each nibble of the chunk's rows where its table begins: 16 times the nibble. */
    const int64_t wide = 16 * job->words;
    uint8_t *offsets = job->scratch + thread * CHUNK * wide;
    int64_t expanded = -1;
#else
    (void)thread;
#endif
    for (int64_t task = from; task < to; task++) {
        const int64_t chunk = task / job->panel_count, panel = task % job->panel_count;
        const int64_t first = chunk * CHUNK;
        const int64_t last = first + CHUNK < job->rows ? first + CHUNK : job->rows;
#ifdef BY_LOOKING_UP
        if (expanded != chunk) {
            for (int64_t row = first; row < last; row++) {
                const uint8_t *bytes = (const uint8_t *)(job->left + row * job->words);
                uint8_t *out = offsets + (row - first) * wide;
                for (int64_t i = 0; i < 8 * job->words; i++) {
                    out[2 * i] = (uint8_t)(bytes[i] << 4);
                    out[2 * i + 1] = (uint8_t)(bytes[i] & 0xf0);
                }
            }
            expanded = chunk;
        }
#endif
        for (int64_t row = first; row < last; row += ROWS) {
            const int rows = last - row < ROWS ? (int)(last - row) : ROWS;
            int32_t found[ROWS][PANEL];
#ifdef BY_LOOKING_UP
            const uint8_t *at[ROWS];
            for (int r = 0; r < ROWS; r++) at[r] = offsets + (row - first + (r < rows ? r : 0)) * wide;
#else
            const uint64_t *at[ROWS];
            for (int r = 0; r < ROWS; r++) at[r] = job->left + (row + (r < rows ? r : 0)) * job->words;
#endif
            count(at, rows, job->panels + panel * job->words * PANEL, job->words, found);
            for (int r = 0; r < rows; r++) write_row(job, row + r, panel * PANEL, found[r]);
        }
    }
}

/* Bytes that each thread of a product wants to work in. */
int64_t xnor_scratch(int64_t words) {
#ifdef BY_LOOKING_UP
    return CHUNK * 16 * words;
#else
    return 0 * words;
#endif
}

/* Words [rows, words] by the panels of [columns, words]: [rows, columns], as integers, or as numbers times of_column
 * [columns], times of_row [rows], plus bias [columns], of which any may be none. */
void xnor_product(const uint64_t *left, const uint64_t *panels, int64_t rows, int64_t columns, int64_t bits,
                  int64_t words, int32_t *integers, float *numbers, const float *of_column, const float *of_row,
                  const float *bias, uint8_t *scratch, int64_t threads) {
    const int64_t panel_count = ceil_div(columns, PANEL);
    const product_t job = {left,     panels,  rows,      columns, words, bits,   panel_count,
                           integers, numbers, of_column, of_row,  bias,  scratch};
    const int worth = rows * columns * words >= WORTH_THREADS / 64;
    in_threads(multiply, &job, ceil_div(rows, CHUNK) * panel_count, worth ? threads : 1);
}

/* The same of rows of numbers, as `xnor_pack` takes them; words: [rows, ceil(bits / 64)] to put their signs. */
void xnor_linear(const void *x, int64_t kind, int64_t stride, uint64_t *words, const uint64_t *panels, int64_t rows,
                 int64_t columns, int64_t bits, float *numbers, const float *of_column, const float *of_row,
                 const float *bias, uint8_t *scratch, int64_t threads) {
    xnor_pack(x, kind, rows, bits, stride, words, threads);
    xnor_product(words, panels, rows, columns, bits, ceil_div(bits, 64), 0, numbers, of_column, of_row, bias, scratch,
                 threads);
}

/* Products of small matrices by the processor's own bfloat16 dot products.
 *
 * Such a dot product takes two neighbours at a time, so the operands here are arrays of 32-bit
 * pairs; sums are in float.
 */
#ifndef LORALAB_DOTS_H
#define LORALAB_DOTS_H
#include "bf16.h"
#ifdef __AVX512BF16__
#include <immintrin.h>

static inline long full(long n, long step) { return (n + step - 1) / step * step; }

static inline uint32_t paired(float first, float second) {
    return down(first) | (uint32_t)down(second) << 16;
}

/* 16 numbers in bfloat16, widened. */
static inline __m512 wide(const bf16 *x) {
    __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)x));
    return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}

static inline void narrow(bf16 *to, __m512 x) {
    _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh(x));
}

/* Two vectors of 16 as 16 pairs. */
static inline __m512i pairs_of(__m512 first, __m512 second) {
    const __m512i order = _mm512_set_epi16(
        31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4,
        19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(second, first));
}

/* Exchange the blocks of size S beside the diagonal of each 2 S x 2 S block: one of four steps that
 * turn 16 rows of 16 pairs into columns. */
#define EXCHANGE(S, r)                                                                          \
    do {                                                                                        \
        const __m512i lane =                                                                    \
            _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);             \
        const __m512i other = _mm512_xor_si512(lane, _mm512_set1_epi32(S));                     \
        const __mmask16 odd = _mm512_test_epi32_mask(lane, _mm512_set1_epi32(S));               \
        _Pragma("GCC unroll 16") for (int i = 0; i < 16; i++) if (!(i & (S))) {                 \
            __m512i a = r[i], b = r[i | (S)];                                                   \
            r[i] = _mm512_mask_permutexvar_epi32(a, odd, other, b);                             \
            r[i | (S)] = _mm512_mask_permutexvar_epi32(b, (__mmask16)~odd, other, a);           \
        }                                                                                       \
    } while (0)

static inline __attribute__((always_inline)) void turn_rows(__m512i *r) {
    EXCHANGE(1, r);
    EXCHANGE(2, r);
    EXCHANGE(4, r);
    EXCHANGE(8, r);
}

/* 16 rows of 16 numbers of 32 bits, turned into columns. */
static inline void turn_block(const void *x, long row, void *out, long out_row) {
    __m512i r[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512((const uint32_t *)x + i * row);
    turn_rows(r);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) _mm512_storeu_si512((uint32_t *)out + i * out_row, r[i]);
}

/* In a register from here on: compilers would rather load it again for each row. */
#define held(x) __asm__("" : "+v"(x))

/* sum[i][j] += sum over pairs p of a[i][p] . b[p][j], for mr rows and nb vectors of 16 columns. */
static inline __attribute__((always_inline)) void accumulate(
    int mr, int nb, long pairs, const uint32_t *a, long a_row, long a_pair, const uint32_t *b,
    long b_pair, long b_vector, __m512 *sum) {
    for (long p = 0; p < pairs; p++) {
        __m512i column[4];
        for (int j = 0; j < nb; j++) {
            column[j] = _mm512_loadu_si512(b + p * b_pair + j * b_vector);
            held(column[j]);
        }
        for (int i = 0; i < mr; i++) {
            __m512bh pair = (__m512bh)_mm512_set1_epi32((int)a[i * a_row + p * a_pair]);
            for (int j = 0; j < nb; j++)
                sum[i * nb + j] = _mm512_dpbf16_ps(sum[i * nb + j], pair, (__m512bh)column[j]);
        }
    }
}

/* c (+)= a . b of the same size. */
static inline __attribute__((always_inline)) void block(
    int mr, int nb, long pairs, const uint32_t *a, long a_row, long a_pair, const uint32_t *b,
    long b_pair, long b_vector, float *c, long c_row, int add) {
    __m512 sum[16];
    for (int i = 0; i < mr; i++)
        for (int j = 0; j < nb; j++)
            sum[i * nb + j] =
                add ? _mm512_loadu_ps(c + i * c_row + 16 * j) : _mm512_setzero_ps();
    accumulate(mr, nb, pairs, a, a_row, a_pair, b, b_pair, b_vector, sum);
    for (int i = 0; i < mr; i++)
        for (int j = 0; j < nb; j++) _mm512_storeu_ps(c + i * c_row + 16 * j, sum[i * nb + j]);
}

/* The same for m rows and n columns, multiples of 16 both. */
static inline void product(long m, long n, long pairs, const uint32_t *a, long a_row, long a_pair,
                           const uint32_t *b, long b_pair, long b_vector, float *c, long c_row,
                           int add) {
    long j = 0;
    for (; j + 64 <= n; j += 64)
        for (long i = 0; i < m; i += 4)
            block(4, 4, pairs, a + i * a_row, a_row, a_pair, b + j / 16 * b_vector, b_pair,
                  b_vector, c + i * c_row + j, c_row, add);
    for (; j + 32 <= n; j += 32)
        for (long i = 0; i < m; i += 8)
            block(8, 2, pairs, a + i * a_row, a_row, a_pair, b + j / 16 * b_vector, b_pair,
                  b_vector, c + i * c_row + j, c_row, add);
    for (; j < n; j += 16)
        for (long i = 0; i < m; i += 16)
            block(16, 1, pairs, a + i * a_row, a_row, a_pair, b + j / 16 * b_vector, b_pair,
                  b_vector, c + i * c_row + j, c_row, add);
}

#endif
#endif

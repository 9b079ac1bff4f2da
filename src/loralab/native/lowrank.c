/* The three thin products of a low-rank update, for ranks that a matrix library is slow at.
 *
 * fused.py has the equation, and torch's own products for other ranks and processors. M is the
 * small matrix in float, (r, width) by its two strides, so that A and the transpose of B are read
 * where they lie; `low` (n, stride) holds the rank of one or several layers side by side, from
 * column `offset` on. `width` is a multiple of 32.
 */
#include "dots.h"
#include <stdlib.h>

#ifdef __AVX512BF16__

/* A few rows of low (rows, r) as pairs of neighbours in r. */
static void rank_pairs(const bf16 *low, long rows, long r, long stride, uint32_t *pairs) {
    for (long i = 0; i < rows; i++)
        for (long p = 0; p < (r + 1) / 2; p++)
            pairs[i * ((r + 1) / 2) + p] =
                low[i * stride + 2 * p] |
                (2 * p + 1 < r ? (uint32_t)low[i * stride + 2 * p + 1] << 16 : 0);
}

/* low = scale x M', x (n, width). */
void low_down(const bf16 *x, const float *M, bf16 *low, long n, long width, long r, long sr,
              long sw, long stride, long offset, float scale, int threads) {
    long lanes = full(r, 16), pairs = width / 2;
    uint32_t *m = aligned_alloc(64, pairs * lanes * 4); /* (lanes / 16, pairs, 16) */
#pragma omp parallel num_threads(threads)
    {
#pragma omp for
        for (long p = 0; p < pairs; p++)
            for (long j = 0; j < lanes; j++)
                m[(j / 16 * pairs + p) * 16 + j % 16] =
                    j < r ? paired(M[j * sr + 2 * p * sw], M[j * sr + (2 * p + 1) * sw]) : 0;
        float sums[16 * lanes];
#pragma omp for
        for (long i = 0; i < n; i += 16) {
            const uint32_t *rows = (const uint32_t *)(x + i * width);
            long last = n - i < 16 ? n - i : 16;
            if (last == 16)
                product(16, lanes, pairs, rows, pairs, 1, m, 16, pairs * 16, sums, lanes, 0);
            else
                for (long k = 0; k < last; k++)
                    for (long j = 0; j < lanes; j += 16)
                        block(1, 1, pairs, rows + k * pairs, pairs, 1, m + j * pairs, 16, 0,
                              sums + k * lanes + j, lanes, 0);
            for (long k = 0; k < last; k++)
                for (long j = 0; j < r; j++)
                    low[(i + k) * stride + offset + j] = down(scale * sums[k * lanes + j]);
        }
    }
    free(m);
}

/* y += low M in mr rows and nb vectors of 16 columns. */
static inline __attribute__((always_inline)) void lift(
    int mr, int nb, long pairs, const uint32_t *low, const uint32_t *m, long width, bf16 *y) {
    __m512 sum[16];
    for (int i = 0; i < mr; i++)
        for (int j = 0; j < nb; j++) sum[i * nb + j] = wide(y + i * width + 16 * j);
    accumulate(mr, nb, pairs, low, pairs, 1, m, width, 16, sum);
    for (int i = 0; i < mr; i++)
        for (int j = 0; j < nb; j++) narrow(y + i * width + 16 * j, sum[i * nb + j]);
}

/* y += low M, y (n, width). */
void low_up(bf16 *y, const float *M, const bf16 *low, long n, long width, long r, long sr, long sw,
            long stride, long offset, int threads) {
    long pairs = (r + 1) / 2;
    uint32_t *m = aligned_alloc(64, pairs * width * 4); /* (pairs, width) */
#pragma omp parallel num_threads(threads)
    {
#pragma omp for
        for (long c = 0; c < width; c++)
            for (long p = 0; p < pairs; p++)
                m[p * width + c] =
                    paired(M[2 * p * sr + c * sw],
                           2 * p + 1 < r ? M[(2 * p + 1) * sr + c * sw] : 0);
        uint32_t own[4 * pairs];
#pragma omp for
        for (long i = 0; i < n; i += 4) {
            long last = n - i < 4 ? n - i : 4, c = 0;
            bf16 *rows = y + i * width;
            rank_pairs(low + i * stride + offset, last, r, stride, own);
            for (; last == 4 && c + 64 <= width; c += 64)
                lift(4, 4, pairs, own, m + c, width, rows + c);
            for (; c < width; c += 32)
                for (long k = 0; k < last; k++)
                    lift(1, 2, pairs, own + k * pairs, m + c, width, rows + k * width + c);
        }
    }
    free(m);
}

/* M = low' x in float, x (n, width). */
void low_outer(const bf16 *x, float *M, const bf16 *low, long n, long width, long r, long sr,
               long sw, long stride, long offset, int threads) {
    long pairs = (n + 1) / 2, lanes = full(r, 8);
    uint32_t *l = aligned_alloc(64, full(pairs * lanes * 4, 64)); /* (lanes / 8, pairs, 8) */
#pragma omp parallel num_threads(threads)
    {
#pragma omp for
        for (long p = 0; p < pairs; p++)
            for (long j = 0; j < lanes; j++) {
                const bf16 *at = low + 2 * p * stride + offset + j;
                l[(j / 8 * pairs + p) * 8 + j % 8] =
                    j < r ? at[0] | (2 * p + 1 < n ? (uint32_t)at[stride] << 16 : 0) : 0;
            }
#pragma omp for
        for (long c = 0; c < width; c += 32)
            for (long j = 0; j < lanes; j += 8) {
                __m512 sum[16];
                for (int k = 0; k < 16; k++) sum[k] = _mm512_setzero_ps();
                for (long p = 0; p < pairs; p++) {
                    const bf16 *row = x + 2 * p * width + c;
                    __m512i first = _mm512_loadu_si512(row);
                    __m512i second = 2 * p + 1 < n ? _mm512_loadu_si512(row + width)
                                                   : _mm512_setzero_si512();
                    __m512bh near = (__m512bh)_mm512_unpacklo_epi16(first, second);
                    __m512bh far = (__m512bh)_mm512_unpackhi_epi16(first, second);
                    for (int k = 0; k < 8; k++) {
                        uint32_t own = l[(j / 8 * pairs + p) * 8 + k];
                        __m512bh pair = (__m512bh)_mm512_set1_epi32((int)own);
                        sum[2 * k] = _mm512_dpbf16_ps(sum[2 * k], pair, near);
                        sum[2 * k + 1] = _mm512_dpbf16_ps(sum[2 * k + 1], pair, far);
                    }
                }
                for (long k = 0; k < 8 && j + k < r; k++)
                    for (int t = 0; t < 32; t++) /* unpacking takes four of each eight columns */
                        M[(j + k) * sr + (c + t) * sw] =
                            ((float *)(sum + 2 * k + t / 4 % 2))[t / 8 * 4 + t % 4];
            }
    }
    free(l);
}

/* One product of those above; `x` is y where it is written to. */
typedef struct {
    void *x;
    float *m;
    bf16 *low;
    int64_t n, width, r, sr, sw, stride, offset;
    double scale;
} thin;

enum { DOWN, UP, OUTER };

/* Many of a kind that do not write to the same place: each by one thread. */
void low_many(long kind, const thin *all, long count, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (long i = 0; i < count; i++) {
        thin p = all[i];
        if (kind == DOWN)
            low_down(p.x, p.m, p.low, p.n, p.width, p.r, p.sr, p.sw, p.stride, p.offset,
                     (float)p.scale, 1);
        else if (kind == UP)
            low_up(p.x, p.m, p.low, p.n, p.width, p.r, p.sr, p.sw, p.stride, p.offset, 1);
        else
            low_outer(p.x, p.m, p.low, p.n, p.width, p.r, p.sr, p.sw, p.stride, p.offset, 1);
    }
}

#endif

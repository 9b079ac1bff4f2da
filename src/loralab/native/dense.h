/* y = x w' for tokens x (n, in) and a weight w (out, in) in torch's own layout.
 *
 * On matrix registers the weight is the left operand, 16 outputs of 32 numbers each, read where it
 * lies; the tokens are the right one, packed once for all products with them. Elsewhere the
 * processor's dot products. Either way what a token gets does not depend on the other tokens, nor on
 * how the outputs are shared by threads. `in` is a multiple of 32.
 *
 * y is written in blocks of 16 outputs, `step` numbers from one to the next, and in these the tokens
 * are `ldy` apart. Blocks of all tokens (ldy 16) keep what is written together: rows as long as a
 * layer is wide lie in the same few places of a cache, and each line would be waited for.
 */
#ifndef LORALAB_DENSE_H
#define LORALAB_DENSE_H
#include "tiles.h"

#ifdef __AVX512BF16__

enum { ROWS = 128 }; /* tokens that stay in cache while weights pass by */

typedef struct {
    const bf16 *rows; /* (n, in) */
    uint32_t *pairs;  /* (n / 16, in / 2, 16) pairs of neighbours in the summed axis; NULL without tiles */
    long n, in;
} tokens;

/* Lane i is the sum of the lanes of v[i]. */
static inline __m512 sums(const __m512 *v) {
    __m512 t[8], u[4];
    for (int i = 0; i < 8; i++)
        t[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]),
                             _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
    for (int i = 0; i < 4; i++) {
        __m512d a = (__m512d)t[2 * i], b = (__m512d)t[2 * i + 1];
        u[i] = _mm512_add_ps((__m512)_mm512_unpacklo_pd(a, b), (__m512)_mm512_unpackhi_pd(a, b));
    }
    __m512 p = _mm512_add_ps(_mm512_shuffle_f32x4(u[0], u[1], 0x88),
                             _mm512_shuffle_f32x4(u[0], u[1], 0xdd));
    __m512 q = _mm512_add_ps(_mm512_shuffle_f32x4(u[2], u[3], 0x88),
                             _mm512_shuffle_f32x4(u[2], u[3], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(p, q, 0x88), _mm512_shuffle_f32x4(p, q, 0xdd));
}

/* out (mr, no) = x (mr, in) w' (no, in), mr * no at most 16. */
static inline __attribute__((always_inline)) void meet(
    int mr, int no, const bf16 *x, const bf16 *w, long in, float *out) {
    __m512 sum[16];
    for (int i = 0; i < 16; i++) sum[i] = _mm512_setzero_ps();
    for (long k = 0; k < in; k += 32) {
        __m512i row[4];
        for (int i = 0; i < mr; i++) {
            row[i] = _mm512_loadu_si512(x + i * in + k);
            held(row[i]);
        }
        for (int j = 0; j < no; j++) {
            __m512i own = _mm512_loadu_si512(w + j * in + k);
            held(own);
            for (int i = 0; i < mr; i++)
                sum[i * no + j] =
                    _mm512_dpbf16_ps(sum[i * no + j], (__m512bh)row[i], (__m512bh)own);
        }
    }
    _mm512_storeu_ps(out, sums(sum));
}

/* The same into y, whose tokens are ldy apart. */
static inline __attribute__((always_inline)) void meet_into(
    int mr, int no, const bf16 *x, const bf16 *w, long in, float *y, long ldy) {
    float out[16];
    meet(mr, no, x, w, in, out);
    for (int i = 0; i < mr; i++) memcpy(y + i * ldy, out + i * no, 4 * no);
}

static inline float meet_one(const bf16 *x, const bf16 *w, long in) {
    __m512 sum = _mm512_setzero_ps();
    for (long k = 0; k < in; k += 32)
        sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(x + k),
                               (__m512bh)_mm512_loadu_si512(w + k));
    return _mm512_reduce_add_ps(sum);
}

/* By dot products: as many rows of w as are left of a multiple of 16 go one by one. */
static void dense_dots(const tokens *x, const bf16 *w, long from, long to, float *y, long ldy,
                       long step) {
    long in = x->in;
    for (long base = 0; base < x->n; base += ROWS) {
        long last = x->n - base < ROWS ? x->n : base + ROWS, o = from;
        for (; o + 16 <= to; o += 16) {
            const bf16 *own = w + o * in;
            float *out = y + o / 16 * step;
            long i = base;
            for (; i + 4 <= last; i += 4)
                for (int j = 0; j < 16; j += 4)
                    meet_into(4, 4, x->rows + i * in, own + j * in, in, out + i * ldy + j, ldy);
            for (; i + 2 <= last; i += 2)
                for (int j = 0; j < 16; j += 8)
                    meet_into(2, 8, x->rows + i * in, own + j * in, in, out + i * ldy + j, ldy);
            for (; i < last; i++) meet_into(1, 16, x->rows + i * in, own, in, out + i * ldy, ldy);
        }
        for (; o < to; o++)
            for (long i = base; i < last; i++)
                y[o / 16 * step + i * ldy + o % 16] = meet_one(x->rows + i * in, w + o * in, in);
    }
}

#ifdef TILES

/* Pack the tokens, each thread some; all of them go on when that is done. */
static void pack(const tokens *x) {
    long pairs = x->in / 2, steps = pairs / 16, all = (x->n + 15) / 16 * steps;
#pragma omp for schedule(static)
    for (long unit = 0; unit < all; unit++) {
        long i = unit / steps * 16, p = unit % steps * 16;
        __m512i r[16];
#pragma GCC unroll 16
        for (long t = 0; t < 16; t++)
            r[t] = _mm512_maskz_loadu_epi32(i + t < x->n ? 0xffff : 0,
                                            x->rows + (i + t) * x->in + 2 * p);
        turn_rows(r);
#pragma GCC unroll 16
        for (long t = 0; t < 16; t++)
            _mm512_storeu_si512(x->pairs + i * pairs + (p + t) * 16, r[t]);
    }
}

/* 16 mr outputs of 16 nc tokens; `ahead` is as much of a weight, to be read next. */
static inline __attribute__((always_inline)) void meet_tiles(
    int mr, int nc, const uint32_t *x, const bf16 *w, long in, const char *ahead, float *out) {
    tile_zero(0);
    tile_zero(1);
    tile_zero(2);
    tile_zero(3);
    for (long k = 0; k < in; k += 32) {
        const uint32_t *column = x + k / 2 * 16;
        if (ahead)
            for (int line = 0; line < 16 * mr; line++, ahead += 64)
                _mm_prefetch(ahead, _MM_HINT_T1);
        tile_load(4, w + k, in * 2);
        tile_load(6, column, 64);
        tile_dot(0, 4, 6);
        if (mr > 1) {
            tile_load(5, w + 16 * in + k, in * 2);
            tile_dot(2, 5, 6);
        }
        if (nc > 1) {
            tile_load(7, column + in / 2 * 16, 64);
            tile_dot(1, 4, 7);
        }
        if (mr > 1 && nc > 1) tile_dot(3, 5, 7);
    }
    tile_store(0, out, 128);
    if (nc > 1) tile_store(1, out + 16, 128);
    if (mr > 1) tile_store(2, out + 16 * 32, 128);
    if (mr > 1 && nc > 1) tile_store(3, out + 16 * 32 + 16, 128);
}

/* 16 outputs of some of 16 tokens, turned into their places in y. */
static inline void turn_out(const float *out, long some, float *y, long ldy) {
    __m512i r[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(out + i * 32);
    turn_rows(r);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++)
        if (i < some) _mm512_storeu_si512(y + i * ldy, r[i]);
}

/* By matrix registers; `to` is `from` and a multiple of 16. */
static void dense_tiles(const tokens *x, const bf16 *w, long from, long to, const bf16 *next,
                        float *y, long ldy, long step) {
    float out[32 * 32] __attribute__((aligned(64)));
    long in = x->in, block = 16 * (in / 2);
    for (long o = from; o < to; o += 32) {
        int mr = to - o > 16 ? 2 : 1;
        const char *ahead = (const char *)(o + 16 * mr < to ? w + (o + 16 * mr) * in : next);
        for (long i = 0; i < x->n; i += 32, ahead = NULL) {
            int nc = x->n - i > 16 ? 2 : 1;
            const uint32_t *own = x->pairs + i / 16 * block;
            written();
            if (mr == 2 && nc == 2)
                meet_tiles(2, 2, own, w + o * in, in, ahead, out);
            else if (mr == 2)
                meet_tiles(2, 1, own, w + o * in, in, ahead, out);
            else if (nc == 2)
                meet_tiles(1, 2, own, w + o * in, in, ahead, out);
            else
                meet_tiles(1, 1, own, w + o * in, in, ahead, out);
            written();
            for (int a = 0; a < mr; a++)
                for (int b = 0; b < nc; b++)
                    turn_out(out + a * 16 * 32 + b * 16, x->n - i - 16 * b,
                             y + (o / 16 + a) * step + (i + 16 * b) * ldy, ldy);
        }
    }
}

#endif

/* y (n, out) = x w' for rows `from` to `to` of w; `next` is where this thread reads on after that. */
static void dense(const tokens *x, const bf16 *w, long from, long to, const bf16 *next, float *y,
                  long ldy, long step) {
    (void)next;
#ifdef TILES
    if (x->pairs) {
        long whole = from + (to - from) / 16 * 16;
        dense_tiles(x, w, from, whole, next, y, ldy, step);
        from = whole;
    }
#endif
    dense_dots(x, w, from, to, y, ldy, step);
}

#endif
#endif

/* Products of tall matrices on the processor's matrix registers, a low-rank update among them.
 *
 * One function: out = scale x the sum over sources of X W, X (n, k) with many rows. A panel of 32
 * columns of every W is brought into the order of the registers once and meets all rows of X: so an
 * update is one more step of 32 in the sum, and what several layers send back to their common input is
 * one sum in float. fused.py says what is computed, tiles.h what a register does.
 */
#include "tiles.h"
#include <stdlib.h>

#ifdef TILES

#define WIDTH 32  /* columns of a panel */
#define STEPS 24  /* steps of 32 whose part of a panel stays in the first cache */

typedef struct {
    const bf16 *x; /* (n, k), a row every x_row numbers */
    const void *w; /* (k, m) by its strides, of which one is 1 */
    int64_t k, x_row, wk, wm, floats;
} source;

typedef struct {
    const source *sources;
    void *out;        /* (n, m) by its strides, in float or bfloat16 */
    const bf16 *bias; /* (m), or null */
    int64_t count, n, m, row, column, floats;
    double scale;
} tall;

/* X of all sources as registers want it: `step` bytes on for the next 32 of the sum, `band` for the
 * next 16 rows. */
typedef struct {
    const char *at;
    long row, step, band;
} left;

static inline __mmask32 first32(long n) { return n >= 32 ? ~0u : n <= 0 ? 0 : (1u << n) - 1; }
static inline __mmask16 first16(long n) { return (__mmask16)first32(n < 16 ? n : 16); }

/* 16 columns of 16 pairs that lie one after the other each, as (16 pairs, 16 columns). */
static inline void pack_across(const source *s, long k, long m, long columns, uint32_t *out) {
    __m512i r[16];
    __mmask32 more = first32(s->k - k);
    __mmask16 low = first16(s->k - k), high = first16(s->k - k - 16);
#pragma GCC unroll 16
    for (int j = 0; j < 16; j++) {
        if (j >= columns)
            r[j] = _mm512_setzero_si512();
        else if (s->floats) {
            const float *w = (const float *)s->w + (m + j) * s->wm + k;
            r[j] = (__m512i)_mm512_cvtne2ps_pbh(_mm512_maskz_loadu_ps(high, w + 16),
                                                _mm512_maskz_loadu_ps(low, w));
        } else
            r[j] = _mm512_maskz_loadu_epi16(more, (const bf16 *)s->w + (m + j) * s->wm + k);
    }
    turn_rows(r);
#pragma GCC unroll 16
    for (int p = 0; p < 16; p++) _mm512_store_si512(out + 16 * p, r[p]);
}

/* 32 columns of W whose rows lie one after the other, as two times (16 pairs, 16 columns). */
static inline void pack_along(const source *s, long k, long m, long columns, uint32_t *out) {
    const __m512i step = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i next_row = _mm512_add_epi32(step, _mm512_set1_epi32(32));
    const __m512i order = _mm512_or_si512(step, _mm512_slli_epi32(next_row, 16));
    const __m512i later = _mm512_add_epi16(order, _mm512_set1_epi16(16));
    for (long p = 0; p < 16; p++, out += 16) {
        long first = 2 * p < s->k - k ? columns : 0, next = 2 * p + 1 < s->k - k ? columns : 0;
        long at = (k + 2 * p) * s->wk + m;
        if (s->floats) {
            const float *w = (const float *)s->w + at;
            for (int h = 0; h < 2; h++, w += 16, first -= 16, next -= 16)
                _mm512_store_si512(out + 256 * h,
                                   pairs_of(_mm512_maskz_loadu_ps(first16(first), w),
                                            _mm512_maskz_loadu_ps(first16(next), w + s->wk)));
        } else {
            const bf16 *w = (const bf16 *)s->w + at;
            __m512i a = _mm512_maskz_loadu_epi16(first32(first), w);
            __m512i b = _mm512_maskz_loadu_epi16(first32(next), w + s->wk);
            _mm512_store_si512(out, _mm512_permutex2var_epi16(a, order, b));
            _mm512_store_si512(out + 256, _mm512_permutex2var_epi16(a, later, b));
        }
    }
}

static void pack_panel(const tall *p, long m, uint32_t *out) {
    for (long t = 0; t < p->count; t++)
        for (long k = 0; k < p->sources[t].k; k += 32, out += 512)
            if (p->sources[t].wk == 1) {
                pack_across(p->sources + t, k, m, p->m - m, out);
                pack_across(p->sources + t, k, m + 16, p->m - m - 16, out + 256);
            } else
                pack_along(p->sources + t, k, m, p->m - m, out);
}

/* Ask for one of `parts` parts of W's next panel, so that packing does not wait for memory. */
static inline void fetch(const tall *p, long m, long part, long parts) {
    for (long t = 0; t < p->count && m < p->m; t++) {
        const source *s = p->sources + t;
        long size = s->floats ? 4 : 2, line = 64 / size, across = s->wk == 1;
        long rows = across ? WIDTH : s->k, lines = across ? (s->k + line - 1) / line : WIDTH / line;
        for (long i = part * rows / parts; i < (part + 1) * rows / parts; i++)
            for (long l = 0; l < lines; l++) {
                long at = across ? (m + i) * s->wm + l * line : i * s->wk + m + l * line;
                _mm_prefetch((const char *)s->w + at * size, _MM_HINT_T1);
            }
    }
}

/* 16 rows of X from row i on, of all sources, in 16 x 64 bytes a step. */
static void pack_rows(const tall *p, long i, char *out) {
    for (long t = 0; t < p->count; t++) {
        const source *s = p->sources + t;
        for (long k = 0; k < s->k; k += 32)
            for (long r = i; r < i + 16; r++, out += 64) {
                __mmask32 some = r < p->n ? first32(s->k - k) : 0;
                _mm512_store_si512(out, _mm512_maskz_loadu_epi16(some, s->x + r * s->x_row + k));
            }
    }
}

/* sums (32, 32), or its first 16 rows, (+)= a b over some steps. */
static inline __attribute__((always_inline)) void sum_block(int both, int add, long steps, left a,
                                                            const uint32_t *b, float *sums) {
    written();
    if (add) {
        tile_load(0, sums, 128);
        tile_load(1, sums + 16, 128);
        if (both) {
            tile_load(2, sums + 512, 128);
            tile_load(3, sums + 528, 128);
        }
    } else {
        tile_zero(0);
        tile_zero(1);
        if (both) {
            tile_zero(2);
            tile_zero(3);
        }
    }
    for (long t = 0; t < steps; t++, a.at += a.step, b += 512) {
        tile_load(4, a.at, a.row);
        tile_load(6, b, 64);
        tile_load(7, b + 256, 64);
        tile_dot(0, 4, 6);
        tile_dot(1, 4, 7);
        if (both) {
            tile_load(5, a.at + a.band, a.row);
            tile_dot(2, 5, 6);
            tile_dot(3, 5, 7);
        }
    }
    tile_store(0, sums, 128);
    tile_store(1, sums + 16, 128);
    if (both) {
        tile_store(2, sums + 512, 128);
        tile_store(3, sums + 528, 128);
    }
}

/* Whole lines of sums in bfloat16. */
static void put_lines(const tall *p, const float *sums, long rows, bf16 *out) {
    for (long r = 0; r < rows; r++, sums += WIDTH, out += p->row)
        _mm512_storeu_si512(
            out, (__m512i)_mm512_cvtne2ps_pbh(_mm512_load_ps(sums + 16), _mm512_load_ps(sums)));
}

/* Sums of rows i on and columns j on to where they belong. */
static void put(const tall *p, const float *sums, long i, long j) {
    __m512 scale = _mm512_set1_ps((float)p->scale);
    long rows = p->n - i < 32 ? p->n - i : 32;
    if (!p->floats && !p->bias && p->scale == 1 && p->m - j >= WIDTH) {
        put_lines(p, sums, rows, (bf16 *)p->out + i * p->row + j);
        return;
    }
    for (long c = 0; c < WIDTH && j + c < p->m; c += 16) {
        __mmask16 some = first16(p->m - j - c);
        __m512 bias = _mm512_setzero_ps();
        if (p->bias) {
            __m256i bits = _mm256_maskz_loadu_epi16(some, p->bias + j + c);
            bias = (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
        }
        for (long r = 0; r < rows; r++) {
            __m512 x = _mm512_fmadd_ps(_mm512_load_ps(sums + r * WIDTH + c), scale, bias);
            long at = (i + r) * p->row + (j + c) * p->column;
            if (!p->floats)
                _mm256_mask_storeu_epi16((bf16 *)p->out + at, some, (__m256i)_mm512_cvtneps_pbh(x));
            else if (p->column == 1)
                _mm512_mask_storeu_ps((float *)p->out + at, some, x);
            else {
                float one[16];
                _mm512_storeu_ps(one, x);
                for (long k = 0; k < 16 && j + c + k < p->m; k++)
                    ((float *)p->out)[at + k * p->column] = one[k];
            }
        }
    }
}

/* Memory of a thread that stays from call to call: fresh pages cost more than the work. */
static void *kept(int slot, long bytes) {
    static _Thread_local void *memory[3];
    static _Thread_local long size[3];
    if (bytes > size[slot]) {
        free(memory[slot]);
        size[slot] = full(bytes, 1 << 16);
        memory[slot] = aligned_alloc(64, size[slot]);
    }
    return memory[slot];
}

/* All rows of X against one panel of columns. */
static void panel(const tall *p, long steps, left x, long j) {
    uint32_t *b = kept(1, steps * 2048);
    float *sums = kept(2, full(p->n, 32) * WIDTH * 4);
    pack_panel(p, j, b);
    for (long t = 0; t < steps; t += STEPS) {
        long some = steps - t < STEPS ? steps - t : STEPS;
        for (long i = 0; i < p->n; i += 32) {
            left a = {x.at + i / 16 * x.band + t * x.step, x.row, x.step, x.band};
            float *to = sums + i * WIDTH;
            if (t == 0) fetch(p, j + WIDTH, i / 32, (p->n + 31) / 32);
            if (p->n - i <= 16)
                sum_block(0, t > 0, some, a, b + t * 512, to);
            else
                sum_block(1, t > 0, some, a, b + t * 512, to);
            if (t + some == steps) put(p, to, i, j);
        }
    }
}

void tall_product(const tall *p, int threads) {
    const source *s = p->sources;
    long steps = 0;
    for (long t = 0; t < p->count; t++) steps += full(s[t].k, 32) / 32;
    left x = {(const char *)s->x, s->x_row * 2, 64, s->x_row * 32};
    /* where a single panel reads X once, it reads it where it lies */
    if (p->m > WIDTH || p->count > 1 || p->n % 16 || s->k % 32)
        x = (left){kept(0, full(p->n, 16) * steps * 64), 64, 1024, steps * 1024};
    int packs = x.row == 64 && x.step == 1024;
#pragma omp parallel num_threads(threads)
    {
        tile_shapes before;
#pragma omp for
        for (long i = 0; i < (packs ? p->n : 0); i += 16)
            pack_rows(p, i, (char *)x.at + i / 16 * x.band);
        open_tiles(&before);
#pragma omp for
        for (long j = 0; j < p->m; j += WIDTH) panel(p, steps, x, j);
        close_tiles(&before);
    }
}

int has_tiles(void) { return tiles_allowed(); }
#else
int has_tiles(void) { return 0; }
#endif

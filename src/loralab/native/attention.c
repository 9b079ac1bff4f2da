/* Attention inside each row of a packed batch, with the processor's own bfloat16 dot products,
 * or its matrix registers.
 *
 * attention.py says what is computed, and has it in torch for other processors. One item of work is
 * one row and one query head; nothing of the size (tokens, tokens) outlives a block of 32 tokens, and
 * what the way back needs beside inputs and output is one number a token: the logarithm (to base 2)
 * of its softmax's sum.
 */
#include "tiles.h"
#include <stdlib.h>

#ifdef __AVX512BF16__

#define ROWS 32 /* queries at a time */
#define KEYS 64 /* keys at a time, on the way back */
#define LOG2E 1.44269504088896341f

/* 2^x to a relative 1e-7: a polynomial in what is left of x after rounding. */
static inline __m512 power(__m512 x) {
    __m512 n = _mm512_roundscale_ps(x, 0), f = _mm512_sub_ps(x, n);
    __m512 p = _mm512_set1_ps(0.00132764606f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.00967554124f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.0555071331f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.240221197f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.693146967f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

/* Which of 16 lanes are among so many. */
static inline __mmask16 first_lanes(long n) {
    return n >= 16 ? 0xffff : n <= 0 ? 0 : (__mmask16)((1u << n) - 1);
}

/* One head of one row, (n, d) from every stride-th number, turned by its angles, times scale; zeros
 * up to `room` rows. */
static void gather(const bf16 *x, long stride, const bf16 *c, const bf16 *s, long n, long room,
                   long d, float scale, bf16 *out) {
    for (long i = 0; i < n; i++) {
        const bf16 *a = x + i * stride;
        bf16 *o = out + i * d;
        if (c)
            turn(a, c + i * d, s + i * d, d, scale, o);
        else
            for (long j = 0; j < d; j++) o[j] = scale == 1 ? a[j] : down(scale * up(a[j]));
    }
    memset(out + n * d, 0, (room - n) * d * sizeof(bf16));
}

/* The transpose of gather, from float. */
static void scatter(const float *x, long stride, const bf16 *c, const bf16 *s, long n, long d,
                    float scale, bf16 *out) {
    for (long i = 0; i < n; i++) {
        const float *a = x + i * d;
        bf16 *o = out + i * stride;
        if (c)
            turn_back(a, c + i * d, s + i * d, d, scale, o);
        else
            for (long j = 0; j < d; j++) o[j] = down(scale * a[j]);
    }
}

/* (n, d) -> (n / 16, d / 2, 16) pairs of neighbours in d: the right operand of x y'. */
static void across(const bf16 *x, long n, long d, uint32_t *out) {
    const uint32_t *pairs = (const uint32_t *)x;
    long p = 0;
    for (; p + 16 <= d / 2; p += 16)
        for (long i = 0; i < n; i += 16)
            turn_block(pairs + i * (d / 2) + p, d / 2, out + i * (d / 2) + p * 16, 16);
    for (; p < d / 2; p++)
        for (long i = 0; i < n; i++)
            out[i / 16 * 16 * (d / 2) + p * 16 + i % 16] = pairs[i * (d / 2) + p];
}

/* (n, d) -> (n / 2, d) pairs of neighbours in n: the right operand of x y. */
static void along(const bf16 *x, long n, long d, uint32_t *out) {
    for (long i = 0; i < n; i += 2)
        for (long j = 0; j < d; j++)
            out[i / 2 * d + j] = x[i * d + j] | (uint32_t)x[(i + 1) * d + j] << 16;
}

/* (n, d) -> (d, n), by way of `pairs` (n / 2, d): the left operand of x' y. */
static void turned(const bf16 *x, long n, long d, uint32_t *pairs, bf16 *out) {
    along(x, n, d, pairs);
    long i = 0;
    for (; i + 16 <= n / 2; i += 16)
        for (long j = 0; j < d; j += 16)
            turn_block(pairs + i * d + j, d, (uint32_t *)out + j * (n / 2) + i, n / 2);
    for (; i < n / 2; i++)
        for (long j = 0; j < d; j++) ((uint32_t *)out)[j * (n / 2) + i] = pairs[i * d + j];
}

/* (d, n) -> (n, d). */
static void turn_floats(const float *x, long n, long d, float *out) {
    for (long j = 0; j < d; j += 16)
        for (long i = 0; i < n; i += 16) turn_block(x + j * n + i, n, out + i * d + j, d);
}

/* How a thread multiplies: by registers, whose blocks are of 32, where d suits them. */
typedef struct {
    int tiles;
    long block;
#ifdef TILES
    tile_shapes before;
#endif
} way;

static way begin(long d) {
    way own = {.block = 16};
#ifdef TILES
    if (d % 32 == 0 && tiles_allowed()) {
        own.tiles = 1, own.block = 32;
        open_tiles(&own.before);
    }
#endif
    (void)d;
    return own;
}

static void end(way *own) {
#ifdef TILES
    if (own->tiles) close_tiles(&own->before);
#endif
    (void)own;
}

static inline void multiply(const way *by, long m, long n, long pairs, const void *a, long a_row,
                            const uint32_t *b, long b_pair, long b_vector, float *c, long c_row,
                            int add) {
#ifdef TILES
    if (by->tiles) {
        tile_multiply(m, n, pairs, a, a_row, b, b_pair, b_vector, c, c_row, add);
        return;
    }
#endif
    (void)by;
    product(m, n, pairs, a, a_row, 1, b, b_pair, b_vector, c, c_row, add);
}

/* Memory of a thread that stays from call to call: fresh pages cost more than the work. */
static void *kept(long bytes) {
    static _Thread_local void *memory;
    static _Thread_local long size;
    if (bytes > size) {
        free(memory);
        size = full(bytes, 1 << 16);
        memory = aligned_alloc(64, size);
    }
    return memory;
}

static void *take(char **from, long bytes) {
    void *at = *from;
    *from += full(bytes, 64);
    return at;
}

/* Scores of one query become e^(score - the largest), zero from `seen` on, to be divided by their
 * sum, which is returned; `log` gets the logarithm, to base 2, of what e^score sums to. */
static float soften(const float *scores, bf16 *weights, long seen, long keys, float *log) {
    __m512 most = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
    for (long j = 0; j < seen; j += 16)
        most = _mm512_mask_max_ps(most, first_lanes(seen - j), most, _mm512_loadu_ps(scores + j));
    float top = _mm512_reduce_max_ps(most) * LOG2E;
    for (long j = 0; j < keys; j += 16) {
        __m512 x = _mm512_fmsub_ps(_mm512_loadu_ps(scores + j), _mm512_set1_ps(LOG2E),
                                   _mm512_set1_ps(top));
        __m512 e = _mm512_maskz_mov_ps(first_lanes(seen - j), power(x));
        sum = _mm512_add_ps(sum, e);
        narrow(weights + j, e);
    }
    float total = _mm512_reduce_add_ps(sum);
    *log = top + log2f(total);
    return total;
}

/* q and out (tokens, heads, d), k and v (tokens, heads / group, d), cos and sin (tokens, d) or
 * null, starts (rows + 1) of the packed rows, logs (heads, tokens). */
void attention(const bf16 *q, const bf16 *k, const bf16 *v, const bf16 *cos, const bf16 *sin,
               const int64_t *starts, bf16 *out, float *logs, long rows, long heads, long group,
               long d, long causal, float scale, int threads) {
    long tokens = starts[rows], kv = heads / group;
#pragma omp parallel num_threads(threads)
    {
        way by = begin(d);
#pragma omp for schedule(dynamic)
        for (long item = 0; item < rows * heads; item++) {
            long row = item / heads, h = item % heads, first = starts[row];
            long n = starts[row + 1] - first, room = full(n, by.block);
            const bf16 *c = cos ? cos + first * d : 0, *s = sin ? sin + first * d : 0;
            const bf16 *keys_in = k + (first * kv + h / group) * d;
            const bf16 *values_in = v + (first * kv + h / group) * d;
            if (n == 1) { /* a token that sees itself alone; its log is never asked for */
                memcpy(out + (first * heads + h) * d, values_in, d * sizeof(bf16));
                continue;
            }
            char *memory = kept(room * d * 10 + ROWS * (room * 6 + d * 4) + 4096);
            bf16 *own = take(&memory, room * d * 2), *queries = take(&memory, room * d * 2);
            uint32_t *keys = take(&memory, room * d * 2), *values = take(&memory, room * d * 2);
            float *scores = take(&memory, ROWS * room * 4), *sums = take(&memory, ROWS * d * 4);
            bf16 *weights = take(&memory, ROWS * room * 2);
            gather(keys_in, kv * d, c, s, n, room, d, 1, own);
            across(own, room, d, keys);
            gather(values_in, kv * d, 0, 0, n, room, d, 1, own);
            along(own, room, d, values);
            gather(q + (first * heads + h) * d, heads * d, c, s, n, room, d, scale, queries);
            for (long i = 0; i < n; i += ROWS) {
                long last = n - i < ROWS ? n - i : ROWS, some = full(last, by.block);
                long seen = causal ? i + some : room;
                multiply(&by, some, seen, d / 2, queries + i * d, d / 2, keys, 16, d * 8, scores,
                         room, 0);
                float sum[ROWS];
                memset(weights + last * room, 0, (some - last) * room * 2);
                for (long r = 0; r < last; r++)
                    sum[r] = soften(scores + r * room, weights + r * room, causal ? i + r + 1 : n,
                                    seen, logs + h * tokens + first + i + r);
                multiply(&by, some, d, seen / 2, weights, room / 2, values, d, 16, sums, d, 0);
                for (long r = 0; r < last; r++)
                    scatter(sums + r * d, 0, 0, 0, 1, d, 1 / sum[r],
                            out + ((first + i + r) * heads + h) * d);
            }
        }
        end(&by);
    }
}

/* Gradients of one block of queries i and keys j: weights and the scores' gradient, bf16, in pairs
 * of queries (ROWS / 2, KEYS), the latter also as rows (ROWS, KEYS). */
static void slopes(const float *scores, const float *d_weights, const float *logs,
                   const float *deltas, long i, long j, long n, int causal, long rows, long keys,
                   uint32_t *weights, uint32_t *d_scores, bf16 *d_rows) {
    for (long r = 0; r < rows; r += 2) {
        long seen[2];
        __m512 log[2], delta[2];
        for (long t = 0; t < 2; t++) {
            long own = i + r + t;
            seen[t] = own >= n ? 0 : (causal ? own + 1 : n) - j;
            log[t] = _mm512_set1_ps(own < n ? logs[own] : 0);
            delta[t] = _mm512_set1_ps(own < n ? deltas[own] : 0);
        }
        for (long m = 0; m < keys; m += 16) {
            __m512 p[2], d[2];
            for (int t = 0; t < 2; t++) {
                long at = (r + t) * KEYS + m;
                __m512 x = _mm512_fmsub_ps(_mm512_loadu_ps(scores + at), _mm512_set1_ps(LOG2E),
                                           log[t]);
                p[t] = _mm512_maskz_mov_ps(first_lanes(seen[t] - m), power(x));
                d[t] = _mm512_mul_ps(
                    p[t], _mm512_sub_ps(_mm512_loadu_ps(d_weights + at), delta[t]));
                narrow(d_rows + at, d[t]);
            }
            _mm512_storeu_si512(weights + r / 2 * KEYS + m, pairs_of(p[0], p[1]));
            _mm512_storeu_si512(d_scores + r / 2 * KEYS + m, pairs_of(d[0], d[1]));
        }
    }
}

/* The sum over the query heads that share a key and a value: (tokens, kv, group, d) -> (tokens, kv,
 * d), tokens kv pairs. */
static void shared(const bf16 *x, long pairs, long group, long d, bf16 *out, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long i = 0; i < pairs; i++)
        for (long j = 0; j < d; j += 16) {
            __m512 sum = _mm512_setzero_ps();
            for (long g = 0; g < group; g++)
                sum = _mm512_add_ps(sum, wide(x + (i * group + g) * d + j));
            narrow(out + i * d + j, sum);
        }
}

/* As attention; all_k and all_v, (tokens, heads, d), are room for what each query head asks for. */
void attention_backward(const bf16 *q, const bf16 *k, const bf16 *v, const bf16 *cos,
                        const bf16 *sin, const int64_t *starts, const bf16 *out,
                        const float *logs, const bf16 *d_out, bf16 *dq, bf16 *dk, bf16 *dv,
                        bf16 *all_k, bf16 *all_v, long rows, long heads, long group, long d,
                        long causal, float scale, int threads) {
    long tokens = starts[rows], kv = heads / group;
#pragma omp parallel num_threads(threads)
    {
        way by = begin(d);
#pragma omp for schedule(dynamic)
        for (long item = 0; item < rows * heads; item++) {
            long row = item / heads, h = item % heads, first = starts[row];
            long n = starts[row + 1] - first, room = full(n, by.block);
            long at = (first * heads + h) * d;
            if (n == 1) {
                memset(dq + at, 0, d * sizeof(bf16));
                memset(all_k + at, 0, d * sizeof(bf16));
                memcpy(all_v + at, d_out + at, d * sizeof(bf16));
                continue;
            }
            const bf16 *c = cos ? cos + first * d : 0, *s = sin ? sin + first * d : 0;
            const float *log = logs + h * tokens + first;
            char *memory = kept(room * (d * 30 + 4) + ROWS * (KEYS * 14 + d * 4) + 8192);
            bf16 *queries = take(&memory, room * d * 2), *own = take(&memory, room * d * 2);
            bf16 *d_own = take(&memory, room * d * 2);
            bf16 *turned_queries = take(&memory, room * d * 2);
            bf16 *turned_d = take(&memory, room * d * 2);
            uint32_t *pairs = take(&memory, room * d * 2);
            uint32_t *keys = take(&memory, room * d * 2), *key_pairs = take(&memory, room * d * 2);
            uint32_t *values = take(&memory, room * d * 2);
            float *sum_k = take(&memory, room * d * 4), *sum_v = take(&memory, room * d * 4);
            float *back = take(&memory, room * d * 4);
            float *deltas = take(&memory, room * 4), *sums = take(&memory, ROWS * d * 4);
            float *scores = take(&memory, ROWS * KEYS * 4);
            float *d_weights = take(&memory, ROWS * KEYS * 4);
            uint32_t *weights = take(&memory, ROWS * KEYS * 2);
            uint32_t *d_scores = take(&memory, ROWS * KEYS * 2);
            bf16 *d_rows = take(&memory, ROWS * KEYS * 2);
            gather(v + (first * kv + h / group) * d, kv * d, 0, 0, n, room, d, 1, own);
            across(own, room, d, values);
            gather(k + (first * kv + h / group) * d, kv * d, c, s, n, room, d, 1, own);
            across(own, room, d, keys);
            along(own, room, d, key_pairs);
            gather(q + at, heads * d, c, s, n, room, d, scale, queries);
            turned(queries, room, d, pairs, turned_queries);
            gather(d_out + at, heads * d, 0, 0, n, room, d, 1, d_own);
            turned(d_own, room, d, pairs, turned_d);
            for (long i = 0; i < n; i++) {
                const bf16 *o = out + at + i * heads * d;
                __m512 sum = _mm512_setzero_ps();
                for (long j = 0; j < d; j += 16)
                    sum = _mm512_fmadd_ps(wide(o + j), wide(d_own + i * d + j), sum);
                deltas[i] = _mm512_reduce_add_ps(sum);
            }
            memset(sum_k, 0, room * d * 4);
            memset(sum_v, 0, room * d * 4);
            for (long i = 0; i < n; i += ROWS) {
                long last = n - i < ROWS ? n - i : ROWS, some = full(last, by.block);
                long seen = causal ? i + some : room;
                for (long j = 0; j < seen; j += KEYS) {
                    long width = seen - j < KEYS ? seen - j : KEYS;
                    multiply(&by, some, width, d / 2, queries + i * d, d / 2, keys + j * (d / 2),
                             16, d * 8, scores, KEYS, 0);
                    multiply(&by, some, width, d / 2, d_own + i * d, d / 2, values + j * (d / 2),
                             16, d * 8, d_weights, KEYS, 0);
                    slopes(scores, d_weights, log, deltas, i, j, n, causal, some, width, weights,
                           d_scores, d_rows);
                    multiply(&by, some, d, width / 2, d_rows, KEYS / 2, key_pairs + j / 2 * d, d,
                             16, sums, d, j > 0);
                    multiply(&by, d, width, some / 2, turned_queries + i, room / 2, d_scores, KEYS,
                             16, sum_k + j, room, 1);
                    multiply(&by, d, width, some / 2, turned_d + i, room / 2, weights, KEYS, 16,
                             sum_v + j, room, 1);
                }
                const bf16 *ci = c ? c + i * d : 0, *si = s ? s + i * d : 0;
                scatter(sums, heads * d, ci, si, last, d, scale, dq + at + i * heads * d);
            }
            turn_floats(sum_k, room, d, back);
            scatter(back, heads * d, c, s, n, d, 1, all_k + at);
            turn_floats(sum_v, room, d, back);
            scatter(back, heads * d, 0, 0, n, d, 1, all_v + at);
        }
        end(&by);
    }
    shared(all_k, tokens * kv, group, d, dk, threads);
    shared(all_v, tokens * kv, group, d, dv, threads);
}

int has_dots(void) { return 1; }
#else
int has_dots(void) { return 0; }
#endif

int has_tiles(void) { return tiles_allowed(); }

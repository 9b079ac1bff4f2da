/* One pass of a Llama-like model over tokens of many requests, each with its own adapter.
 *
 * Every token has a place in a request; keys and values lie in blocks of 16 places that the
 * requests share (block tables). A step is memory traffic: each weight is read once for all tokens,
 * in the layout that torch keeps it in, and an adapter's A and B only for its own tokens, whatever
 * the ranks of others. Sums are in float and are rounded where the model's own code rounds.
 *
 * Axes: n tokens, h hidden, f inner, heads, groups (key heads), d numbers a head, r rank.
 */
#include "dots.h"
#include <stdlib.h>

#ifdef __AVX512BF16__

enum { PLACES = 16, TOKENS = 8, ROWS = 128 };

/* What serving/runners/native.py passes, in the same order. */
typedef struct {
    int64_t layers, h, f, heads, groups, d, vocabulary;
    double eps, scale;
    const bf16 *const *weights; /* (layers, 12): norms, projections and biases, as below */
    const bf16 *final_norm, *head;
    bf16 *keys, *values; /* (layers, blocks, PLACES, groups, d) */
    int64_t blocks;
} model;

enum { NORM, Q, K, V, BQ, BK, BV, O, NORM2, GATE, UP, DOWN, WEIGHTS };

/* One projection of one adapter; what is absent is NULL. */
typedef struct {
    const bf16 *a;      /* (r, in) */
    const uint32_t *b;  /* (r / 2, out): pairs of neighbours in r, with the scaling in them */
    const float *ratio; /* (out), of DoRA: before the bias */
    const float *after; /* (out), of (IA)3: of the output, bias included */
    const float *before; /* (in), of (IA)3: of the input */
    int64_t r;
} update;

enum { UQ, UK, UV, UO, UGATE, UUP, UDOWN, UPDATES };

typedef struct {
    int64_t n, spans, width, m;
    bf16 *x;                 /* (n, h): embedded tokens; overwritten */
    const bf16 *cos, *sin;   /* (n, d) */
    const int32_t *place;    /* (n) */
    const int32_t *request;  /* (n): row of the tables */
    const int32_t *tables;   /* (requests, width): numbers of blocks */
    const int64_t *span;     /* (spans, 3): start, stop, adapter or -1 */
    const update *const *adapters; /* each (layers, UPDATES) */
    const int64_t *asked;    /* (m): tokens whose logits are wanted */
    float *logits;           /* (m, vocabulary) */
} batch;

typedef struct { int64_t start, stop; const update *u; } piece; /* some tokens of one adapter */

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

/* y (mr, no) = x (mr, in) w' (no, in), mr * no = 16. */
static inline __attribute__((always_inline)) void meet(
    int mr, int no, const bf16 *x, const bf16 *w, long in, float *y, long ldy) {
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
    __m512 all = sums(sum);
    float out[16];
    _mm512_storeu_ps(out, all);
    for (int i = 0; i < mr; i++) memcpy(y + i * ldy, out + i * no, 4 * no);
}

static inline float meet_one(const bf16 *x, const bf16 *w, long in) {
    __m512 sum = _mm512_setzero_ps();
    for (long k = 0; k < in; k += 32)
        sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(x + k),
                               (__m512bh)_mm512_loadu_si512(w + k));
    return _mm512_reduce_add_ps(sum);
}

/* y (n, out) = x (n, in) w' for rows `from` to `to` of w (out, in). */
static void dense(const bf16 *x, long n, const bf16 *w, long in, long from, long to, float *y,
                  long ldy) {
    for (long base = 0; base < n; base += ROWS) {
        long last = n - base < ROWS ? n : base + ROWS, o = from;
        for (; o + 16 <= to; o += 16) {
            const bf16 *own = w + o * in;
            long i = base;
            for (; i + 4 <= last; i += 4)
                for (int j = 0; j < 16; j += 4)
                    meet(4, 4, x + i * in, own + j * in, in, y + i * ldy + o + j, ldy);
            for (; i + 2 <= last; i += 2)
                for (int j = 0; j < 16; j += 8)
                    meet(2, 8, x + i * in, own + j * in, in, y + i * ldy + o + j, ldy);
            for (; i < last; i++) meet(1, 16, x + i * in, own, in, y + i * ldy + o, ldy);
        }
        for (; o < to; o++)
            for (long i = base; i < last; i++) y[i * ldy + o] = meet_one(x + i * in, w + o * in, in);
    }
}

/* The share of a thread, in steps of 16. */
static inline void share(long size, int thread, int threads, long *from, long *to) {
    long steps = (size + 15) / 16;
    *from = steps * thread / threads * 16;
    *to = steps * (thread + 1) / threads * 16;
    if (*to > size) *to = size;
}

/* y (out) += low B of a few tokens, two ranks at a time. */
static void lift_rows(const float *low, long tokens, const update *u, long out, float *y,
                      long ldy) {
    long pairs = (u->r + 1) / 2;
    for (long i = 0; i < tokens; i++) {
        const float *own = low + i * 2 * pairs;
        for (long c = 0; c < out; c += 64) {
            int nb = out - c < 64 ? (int)((out - c) / 16) : 4;
            __m512 sum[4];
            for (int j = 0; j < nb; j++) sum[j] = _mm512_loadu_ps(y + i * ldy + c + 16 * j);
            for (long p = 0; p < pairs; p++) {
                __m512bh pair = (__m512bh)_mm512_set1_epi32((int)paired(own[2 * p], own[2 * p + 1]));
                for (int j = 0; j < nb; j++)
                    sum[j] = _mm512_dpbf16_ps(
                        sum[j], pair,
                        (__m512bh)_mm512_loadu_si512(u->b + p * out + c + 16 * j));
            }
            for (int j = 0; j < nb; j++) _mm512_storeu_ps(y + i * ldy + c + 16 * j, sum[j]);
        }
    }
}

/* What an adapter and the bias make of y = x W' of a few tokens; `low` has room for them. */
static void adapt(const update *u, const bf16 *bias, const bf16 *x, long tokens, long in, long out,
                  float *y, long ldy, float *low) {
    if (u != NULL && u->r) {
        long even = (u->r + 1) / 2 * 2;
        for (long i = 0; i < tokens; i++) low[i * even + even - 1] = 0;
        dense(x, tokens, u->a, in, 0, u->r, low, even);
        lift_rows(low, tokens, u, out, y, ldy);
    }
    for (long i = 0; i < tokens; i++) {
        float *own = y + i * ldy;
        if (u != NULL && u->ratio)
            for (long c = 0; c < out; c++) own[c] *= u->ratio[c];
        if (bias)
            for (long c = 0; c < out; c++) own[c] += up(bias[c]);
        if (u != NULL && u->after)
            for (long c = 0; c < out; c++) own[c] = rounded(own[c]) * u->after[c];
    }
}

static void norm(const bf16 *x, const bf16 *weight, long h, float eps, bf16 *y) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (long c = 0; c < h; c++) sum += up(x[c]) * up(x[c]);
    float scale = 1.0f / sqrtf(sum / (float)h + eps);
#pragma omp simd
    for (long c = 0; c < h; c++) y[c] = down(up(weight[c]) * rounded(up(x[c]) * scale));
}

static inline void turned(const float *x, const bf16 *c, const bf16 *s, long d, bf16 *out) {
    long half = d / 2;
#pragma omp simd
    for (long j = 0; j < half; j++) {
        float p = rounded(x[j]), q = rounded(x[j + half]);
        out[j] = down(rounded(p * up(c[j])) - rounded(q * up(s[j])));
        out[j + half] = down(rounded(q * up(c[j + half])) + rounded(p * up(s[j + half])));
    }
}

/* One token's queries of one key head against all places up to its own. */
static void attend(const model *m, const bf16 *q, const bf16 *keys, const bf16 *values,
                   const int32_t *table, long places, long group, bf16 *out, float *scores,
                   long room) {
    long d = m->d, size = m->heads / m->groups, step = m->groups * d;
    for (long g = 0; g < size; g++) {
        float most = -INFINITY;
        for (long first = 0; first < places; first += PLACES) {
            const bf16 *k = keys + (long)table[first / PLACES] * PLACES * step + group * d;
            __m512 sum[PLACES];
            long here = places - first < PLACES ? places - first : PLACES;
            for (long t = 0; t < PLACES; t++) {
                sum[t] = _mm512_setzero_ps();
                if (t >= here) continue;
                for (long c = 0; c < d; c += 32)
                    sum[t] = _mm512_dpbf16_ps(
                        sum[t], (__m512bh)_mm512_loadu_si512(q + g * d + c),
                        (__m512bh)_mm512_loadu_si512(k + t * step + c));
            }
            __m512 all = _mm512_mul_ps(sums(sum), _mm512_set1_ps((float)m->scale));
            __mmask16 seen = (__mmask16)((1u << here) - 1);
            all = _mm512_mask_blend_ps(seen, _mm512_set1_ps(-INFINITY), all);
            _mm512_storeu_ps(scores + g * room + first, all);
            float own = _mm512_reduce_max_ps(all);
            most = own > most ? own : most;
        }
        float total = 0, *own = scores + g * room;
#pragma omp simd reduction(+ : total)
        for (long t = 0; t < places; t++) {
            own[t] = exponential(own[t] - most);
            total += own[t];
        }
        float part = 1.0f / total;
        for (long t = 0; t < places; t++) own[t] *= part;
    }
    for (long c = 0; c < d; c += 16)
        for (long g = 0; g < size; g++) {
            __m512 sum = _mm512_setzero_ps();
            for (long t = 0; t < places; t++) {
                const bf16 *v = values +
                    ((long)table[t / PLACES] * PLACES + t % PLACES) * step + group * d;
                sum = _mm512_fmadd_ps(_mm512_set1_ps(scores[g * room + t]), wide(v + c), sum);
            }
            narrow(out + g * d + c, sum);
        }
}

/* Spans cut into pieces that threads take one after the other. */
static long cut(const batch *b, piece *pieces) {
    long count = 0;
    for (long s = 0; s < b->spans; s++) {
        const int64_t *span = b->span + 3 * s;
        for (long i = span[0]; i < span[1]; i += TOKENS) {
            long stop = span[1] - i < TOKENS ? span[1] : i + TOKENS;
            const update *u = span[2] < 0 ? NULL : b->adapters[span[2]];
            pieces[count++] = (piece){i, stop, u};
        }
    }
    return count;
}

static long most_ranks(const model *m, const batch *b) {
    long most = 2;
    for (long s = 0; s < b->spans; s++)
        for (long i = 0; b->span[3 * s + 2] >= 0 && i < m->layers * UPDATES; i++) {
            long r = b->adapters[b->span[3 * s + 2]][i].r + 1;
            most = r > most ? r : most;
        }
    return most;
}

/* x += y as the model rounds it, and the norm of the sum for what comes next. */
static void settle(bf16 *x, const float *y, long h, const bf16 *weight, float eps, bf16 *normed) {
#pragma omp simd
    for (long c = 0; c < h; c++) x[c] = down(up(x[c]) + rounded(y[c]));
    norm(x, weight, h, eps, normed);
}

static inline const update *of(const piece *p, long layer, int which) {
    return p->u == NULL ? NULL : p->u + layer * UPDATES + which;
}

/* Queries, keys and values of a piece: adapted, turned, and the latter two put into their places. */
static void place_piece(const model *m, const batch *b, long layer, const bf16 *const *w,
                        const piece *p, const bf16 *normed, float *y, long ldy, bf16 *q,
                        float *low) {
    long h = m->h, d = m->d, tokens = p->stop - p->start, wide_q = m->heads * d;
    long wide_k = m->groups * d, start = p->start;
    const bf16 *x = normed + start * h;
    float *own = y + start * ldy;
    adapt(of(p, layer, UQ), w[BQ], x, tokens, h, wide_q, own, ldy, low);
    adapt(of(p, layer, UK), w[BK], x, tokens, h, wide_k, own + wide_q, ldy, low);
    adapt(of(p, layer, UV), w[BV], x, tokens, h, wide_k, own + wide_q + wide_k, ldy, low);
    for (long i = start; i < p->stop; i++) {
        const int32_t *table = b->tables + b->request[i] * b->width;
        long at = b->place[i], block = table[at / PLACES];
        long offset = ((layer * m->blocks + block) * PLACES + at % PLACES) * wide_k;
        const bf16 *c = b->cos + i * d, *s = b->sin + i * d;
        const float *row = y + i * ldy;
        for (long j = 0; j < m->heads; j++) turned(row + j * d, c, s, d, q + i * wide_q + j * d);
        for (long j = 0; j < m->groups; j++)
            turned(row + wide_q + j * d, c, s, d, m->keys + offset + j * d);
        for (long j = 0; j < wide_k; j++)
            m->values[offset + j] = down(row[wide_q + wide_k + j]);
    }
}

/* silu(gate) * up of a piece, as rounded as the model does. */
static void gate_piece(const model *m, long layer, const piece *p, const bf16 *normed, float *y,
                       bf16 *inner, float *low) {
    long h = m->h, f = m->f, tokens = p->stop - p->start;
    float *own = y + p->start * 2 * f;
    adapt(of(p, layer, UGATE), NULL, normed + p->start * h, tokens, h, f, own, 2 * f, low);
    adapt(of(p, layer, UUP), NULL, normed + p->start * h, tokens, h, f, own + f, 2 * f, low);
    const update *u = of(p, layer, UDOWN);
    for (long i = p->start; i < p->stop; i++) {
        const float *row = y + i * 2 * f;
        bf16 *out = inner + i * f;
#pragma omp simd
        for (long c = 0; c < f; c++) {
            float g = rounded(row[c]);
            out[c] = down(rounded(g / (1.0f + exponential(-g))) * rounded(row[f + c]));
        }
        if (u != NULL && u->before)
            for (long c = 0; c < f; c++) out[c] = down(up(out[c]) * u->before[c]);
    }
}

/* A piece's way back to x: adapted, added, and the norm for what comes next. */
static void settle_piece(const batch *b, const piece *p, long layer, int which, const bf16 *in,
                         long wide, float *y, long h, const bf16 *weight, float eps, bf16 *normed,
                         float *low) {
    long start = p->start;
    adapt(of(p, layer, which), NULL, in + start * wide, p->stop - start, wide, h, y + start * h, h,
          low);
    for (long t = start; t < p->stop; t++)
        settle(b->x + t * h, y + t * h, h, weight, eps, normed + t * h);
}

/* All of a step: the tokens through every layer, keys and values kept, logits of those asked. */
void llama_step(const model *m, const batch *b, int threads) {
    long n = b->n, h = m->h, f = m->f, d = m->d, size = m->heads / m->groups;
    long wide_q = m->heads * d, wide_k = m->groups * d, all = wide_q + 2 * wide_k;
    long widest = all > 2 * f ? all : 2 * f, room = b->width * PLACES;
    bf16 *normed = aligned_alloc(64, full(n * h * 2, 64));
    bf16 *q = aligned_alloc(64, full(n * wide_q * 2, 64));
    bf16 *seen = aligned_alloc(64, full(n * wide_q * 2, 64));
    bf16 *inner = aligned_alloc(64, full(n * f * 2, 64));
    float *y = aligned_alloc(64, full(n * widest * 4, 64));
    piece *pieces = malloc((n + b->spans) * sizeof(piece));
    long count = cut(b, pieces), ranks = most_ranks(m, b);
    float eps = (float)m->eps;
#pragma omp parallel num_threads(threads)
    {
        float *low = malloc(4 * (TOKENS + 1) * (ranks + 16));
        float *scores = malloc(4 * size * (room + PLACES));
        /* parts of one weight each: their number need not be a multiple of the threads' */
        int thread = 0, of_threads = 1;
#ifdef _OPENMP
        extern int omp_get_thread_num(void), omp_get_num_threads(void);
        thread = omp_get_thread_num(), of_threads = omp_get_num_threads();
#endif
        long from, to;
#pragma omp for schedule(static)
        for (long i = 0; i < n; i++) norm(b->x + i * h, m->weights[NORM], h, eps, normed + i * h);
        for (long layer = 0; layer < m->layers; layer++) {
            const bf16 *const *w = m->weights + layer * WEIGHTS;
            const bf16 *next = layer + 1 < m->layers ? w[WEIGHTS + NORM] : m->final_norm;
            const bf16 *keys = m->keys + layer * m->blocks * PLACES * wide_k;
            const bf16 *values = m->values + layer * m->blocks * PLACES * wide_k;
            share(wide_q, thread, of_threads, &from, &to);
            dense(normed, n, w[Q], h, from, to, y, all);
            share(wide_k, thread, of_threads, &from, &to);
            dense(normed, n, w[K], h, from, to, y + wide_q, all);
            dense(normed, n, w[V], h, from, to, y + wide_q + wide_k, all);
#pragma omp barrier
#pragma omp for schedule(dynamic)
            for (long i = 0; i < count; i++)
                place_piece(m, b, layer, w, pieces + i, normed, y, all, q, low);
#pragma omp for schedule(dynamic, 4)
            for (long i = 0; i < n * m->groups; i++) {
                long token = i / m->groups, group = i % m->groups;
                attend(m, q + token * wide_q + group * size * d, keys, values,
                       b->tables + b->request[token] * b->width, b->place[token] + 1, group,
                       seen + token * wide_q + group * size * d, scores, room);
            }
            share(h, thread, of_threads, &from, &to);
            dense(seen, n, w[O], wide_q, from, to, y, h);
#pragma omp barrier
#pragma omp for schedule(dynamic)
            for (long i = 0; i < count; i++)
                settle_piece(b, pieces + i, layer, UO, seen, wide_q, y, h, w[NORM2], eps, normed,
                             low);
            share(f, thread, of_threads, &from, &to);
            dense(normed, n, w[GATE], h, from, to, y, 2 * f);
            dense(normed, n, w[UP], h, from, to, y + f, 2 * f);
#pragma omp barrier
#pragma omp for schedule(dynamic)
            for (long i = 0; i < count; i++)
                gate_piece(m, layer, pieces + i, normed, y, inner, low);
            share(h, thread, of_threads, &from, &to);
            dense(inner, n, w[DOWN], f, from, to, y, h);
#pragma omp barrier
#pragma omp for schedule(dynamic)
            for (long i = 0; i < count; i++)
                settle_piece(b, pieces + i, layer, UDOWN, inner, f, y, h, next, eps, normed, low);
        }
        free(low);
        free(scores);
        /* the asked rows side by side, so that the head is read once */
#pragma omp for schedule(static)
        for (long i = 0; i < b->m; i++)
            memcpy(b->x + i * h, normed + b->asked[i] * h, 2 * h);
        share(m->vocabulary, thread, of_threads, &from, &to);
        dense(b->x, b->m, m->head, h, from, to, b->logits, m->vocabulary);
    }
    free(normed), free(q), free(seen), free(inner), free(y), free(pieces);
}

#endif

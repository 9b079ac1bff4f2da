/* What a token of a serving step goes through between two products, rounded where the model rounds:
 * norms, rotation, attention over blocks of keys and values, the gate.
 */
#ifndef LORALAB_TOKEN_H
#define LORALAB_TOKEN_H
#include "dense.h"

#ifdef __AVX512BF16__

enum { PLACES = 16 }; /* of a block */

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

/* 32 columns of the values of all places, weighted by the scores of mg heads. */
static inline __attribute__((always_inline)) void weigh(
    int mg, const float *scores, long room, const bf16 *values, long stride, const int32_t *table,
    long places, bf16 *out, long ldo) {
    __m512 sum[8];
    for (int i = 0; i < 2 * mg; i++) sum[i] = _mm512_setzero_ps();
    for (long first = 0; first < places; first += PLACES) {
        const bf16 *v = values + (long)table[first / PLACES] * PLACES * stride;
        long last = places - first < PLACES ? places : first + PLACES;
        for (long t = first; t < last; t++, v += stride) {
            __m512 near = wide(v), far = wide(v + 16);
            for (int g = 0; g < mg; g++) {
                __m512 own = _mm512_set1_ps(scores[g * room + t]);
                sum[2 * g] = _mm512_fmadd_ps(own, near, sum[2 * g]);
                sum[2 * g + 1] = _mm512_fmadd_ps(own, far, sum[2 * g + 1]);
            }
        }
    }
    for (int g = 0; g < mg; g++) {
        narrow(out + g * ldo, sum[2 * g]);
        narrow(out + g * ldo + 16, sum[2 * g + 1]);
    }
}

/* One token's queries (size, d) of one key head against all places up to its own; keys and values
 * of neighbouring places are `stride` apart. */
static void attend(const bf16 *q, const bf16 *keys, const bf16 *values, long stride, long size,
                   long d, float scale, const int32_t *table, long places, bf16 *out,
                   float *scores, long room) {
    for (long g = 0; g < size; g++) {
        float most = -INFINITY;
        for (long first = 0; first < places; first += PLACES) {
            const bf16 *k = keys + (long)table[first / PLACES] * PLACES * stride;
            const bf16 *v = values + (k - keys);
            __m512 sum[PLACES];
            long here = places - first < PLACES ? places - first : PLACES;
            for (long t = 0; t < PLACES; t++) {
                sum[t] = _mm512_setzero_ps();
                if (t >= here) continue;
                for (long c = 0; c < d; c += 32) {
                    if (!g) _mm_prefetch((const char *)(v + t * stride + c), _MM_HINT_T0);
                    sum[t] = _mm512_dpbf16_ps(
                        sum[t], (__m512bh)_mm512_loadu_si512(q + g * d + c),
                        (__m512bh)_mm512_loadu_si512(k + t * stride + c));
                }
            }
            __m512 all = _mm512_mul_ps(sums(sum), _mm512_set1_ps(scale));
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
    for (long c = 0; c < d; c += 32)
        for (long g = 0, some; g < size; g += some) {
            some = size - g < 4 ? size - g : 4;
            const float *own = scores + g * room;
            const bf16 *v = values + c;
            if (some == 4)
                weigh(4, own, room, v, stride, table, places, out + g * d + c, d);
            else if (some == 3)
                weigh(3, own, room, v, stride, table, places, out + g * d + c, d);
            else if (some == 2)
                weigh(2, own, room, v, stride, table, places, out + g * d + c, d);
            else
                weigh(1, own, room, v, stride, table, places, out + g * d + c, d);
        }
}

/* x += y as the model rounds it, and the norm of the sum for what comes next. */
static void settle(bf16 *x, const float *y, long h, const bf16 *weight, float eps, bf16 *normed) {
#pragma omp simd
    for (long c = 0; c < h; c++) x[c] = down(up(x[c]) + rounded(y[c]));
    norm(x, weight, h, eps, normed);
}

/* silu(gate) * up of some columns of a token, as rounded as the model does. */
static void gate_token(const float *gate, const float *up_, const float *before, long some,
                       bf16 *out) {
#pragma omp simd
    for (long c = 0; c < some; c++) {
        float g = rounded(gate[c]);
        out[c] = down(rounded(g / (1.0f + exponential(-g))) * rounded(up_[c]));
    }
    if (before)
        for (long c = 0; c < some; c++) out[c] = down(up(out[c]) * before[c]);
}

#endif
#endif

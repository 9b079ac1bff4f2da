/* bfloat16 as the upper half of a float; an exponential that compilers vectorise; rotation. */
#ifndef LORALAB_BF16_H
#define LORALAB_BF16_H
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;

static inline float up(bf16 value) {
    uint32_t bits = (uint32_t)value << 16;
    float out;
    memcpy(&out, &bits, 4);
    return out;
}

/* To the nearest, ties to even; every NaN becomes the same NaN. */
static inline bf16 down(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    bits += 0x7fff + ((bits >> 16) & 1);
    return value != value ? 0x7fc0 : (bf16)(bits >> 16);
}

static inline float rounded(float value) { return up(down(value)); }

/* e^x to a relative 2e-7 (the polynomial of Cephes' expf), in a form that compilers vectorise. */
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    float n = rintf(x * 1.44269504088896341f);
    float f = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * f * f + f + 1.0f;
    int32_t bits = ((int32_t)n + 127) << 23;
    float scale;
    memcpy(&scale, &bits, 4);
    return p * scale;
}

/* One head (d): pairs (j, j + d/2) turned by the angles of their token, times scale. */
static inline void turn(const bf16 *x, const bf16 *c, const bf16 *s, long d, float scale,
                        bf16 *out) {
    long half = d / 2;
#pragma omp simd
    for (long j = 0; j < half; j++) {
        float p = up(x[j]), q = up(x[j + half]);
        out[j] = down(scale * (p * up(c[j]) - q * up(s[j])));
        out[j + half] = down(scale * (q * up(c[j + half]) + p * up(s[j + half])));
    }
}

/* The transpose of turn, from float. */
static inline void turn_back(const float *x, const bf16 *c, const bf16 *s, long d, float scale,
                             bf16 *out) {
    long half = d / 2;
#pragma omp simd
    for (long j = 0; j < half; j++) {
        float p = x[j], q = x[j + half];
        out[j] = down(scale * (p * up(c[j]) + q * up(s[j + half])));
        out[j + half] = down(scale * (q * up(c[j + half]) - p * up(s[j])));
    }
}

#endif

/* What ssprop_fx/native.py calls: loops over float32 data for which PyTorch has no operation of one pass.

   Plain C with OpenMP, without Python's or PyTorch's headers. The loops stand in loops.h, which is compiled once for any
   processor and, on x86-64, for AVX2 and for AVX-512; each call runs what the processor has. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num(void) { return 0; }
static int omp_get_num_threads(void) { return 1; }
#endif

/* A convolution's spatial sizes, three of each: those that it has not stand in front and are 1, the padding 0; and how far
   apart neighbouring positions, and channels, are in memory. */
typedef struct {
    int64_t in[3], out[3], kernel[3], stride[3], padding[3], dilation[3];
    int64_t grad_position, grad_channel, input_position, input_channel;
} Geometry;

/* A depthwise convolution: grad (samples, channels, out) and input (samples, channels, in) in one of two layouts each; weight
   (channels, kernel), contiguous; the kept channels. input_grad, laid out as the input, may be null; weight_grad (channels,
   kernel) and bias_grad (channels) come as zeros. */
typedef struct {
    const float *grad, *input, *weight;
    const int64_t *index;
    int64_t kept, samples, channels;
    const Geometry *geometry;
    float *input_grad, *weight_grad, *bias_grad;
} Depthwise;

#define JOIN(a, b) a##b
#define NAME_(name, variant) JOIN(name, variant)
#define NAME(name) NAME_(name, VARIANT)

#define VARIANT _any
#define TARGET
#define BYTES 32
#include "loops.h"

#if defined(__x86_64__) && defined(__GNUC__)
#undef VARIANT
#undef TARGET
#define VARIANT _avx2
#define TARGET __attribute__((target("avx2,fma")))
#include "loops.h"

#undef VARIANT
#undef TARGET
#undef BYTES
#define VARIANT _avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#define BYTES 64
#include "loops.h"

static int vectors(void) /* bytes of the widest that this processor has */
{
    int fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    int wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vl");
    return fma ? wide ? 64 : 32 : 0;
}
#define RUN(name, ...) \
    (vectors() == 64 ? name##_avx512(__VA_ARGS__) : vectors() ? name##_avx2(__VA_ARGS__) : name##_any(__VA_ARGS__))
#else
#define RUN(name, ...) name##_any(__VA_ARGS__)
#endif

/* Of the functions' arguments, as in native.py. */
int ssprop_version(void) { return 1; }

/* Every other function returns 0, or 1 when there is no memory for what it has to put aside. */

int ssprop_abs_sum(const float *grad, int64_t samples, int64_t channels, int64_t positions, int last, float *sums,
                   int threads)
{
    return last ? RUN(abs_sum_last, grad, samples * positions, channels, sums, threads)
                : RUN(abs_sum_first, grad, samples, channels, positions, sums, threads);
}

/* The keep channels of each group with the highest scores, ascending; NaN ranks first, of equal ones the first. */
int ssprop_kept_channels(const float *scores, int64_t channels, int64_t groups, int64_t keep, int64_t *index)
{
    int64_t size = channels / groups;
    uint32_t *keys = malloc((size_t)size * sizeof(uint32_t));
    if (!keys) return 1;
    for (int64_t group = 0; group < groups; group++) {
        /* the bits of a float as a whole number of the same order */
        for (int64_t c = 0; c < size; c++) {
            float score = scores[group * size + c];
            memcpy(&keys[c], &score, sizeof score);
            keys[c] = isnan(score) ? UINT32_MAX : keys[c] >> 31 ? ~keys[c] : keys[c] | 1u << 31;
        }
        /* the lowest key that is kept, byte by byte, and how many of the equal ones are */
        uint32_t lowest = 0;
        int64_t wanted = keep;
        for (int shift = 24; shift >= 0; shift -= 8) {
            int64_t counts[256] = {0};
            for (int64_t c = 0; c < size; c++)
                if (shift == 24 || keys[c] >> (shift + 8) == lowest >> (shift + 8)) counts[keys[c] >> shift & 255]++;
            int byte = 255;
            while (counts[byte] < wanted) wanted -= counts[byte--];
            lowest |= (uint32_t)byte << shift;
        }
        for (int64_t c = 0; c < size; c++)
            if (keys[c] > lowest || (keys[c] == lowest && wanted-- > 0)) *index++ = group * size + c;
    }
    free(keys);
    return 0;
}

int ssprop_take_last(const float *values, int64_t rows, int64_t channels, const int64_t *index, int64_t kept, float *taken,
                     int threads)
{
    return RUN(take_last, values, rows, channels, index, kept, taken, threads);
}

int ssprop_depthwise(const float *grad, const float *input, const float *weight, const int64_t *index, int64_t kept,
                     int64_t samples, int64_t channels, const Geometry *geometry, float *input_grad, float *weight_grad,
                     float *bias_grad, int threads)
{
    Depthwise all = {grad, input, weight, index, kept, samples, channels, geometry, input_grad, weight_grad, bias_grad};
    return RUN(depthwise, &all, threads);
}

int ssprop_pointwise(const float *grad, const float *input, const float *weight, const int64_t *index, int64_t kept,
                     int64_t rows, int64_t channels, int64_t inputs, float *input_grad, float *weight_grad, float *bias_grad,
                     int threads)
{
    return RUN(pointwise, grad, input, weight, index, kept, rows, channels, inputs, input_grad, weight_grad, bias_grad, threads);
}

/* What ssprop_fx/native.py calls: loops over float32 data for which PyTorch has no operation of one pass.

   Plain C with OpenMP, without Python's or PyTorch's headers. The loops stand in kernels.h, which is compiled once for any
   processor and, on x86-64, once more with AVX2; which of the two runs is settled at the first call. */

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

#define JOIN(a, b) a##b
#define NAME_(name, variant) JOIN(name, variant)
#define NAME(name) NAME_(name, VARIANT)

#define VARIANT _any
#define TARGET
#include "kernels.h"
#undef VARIANT
#undef TARGET

#if defined(__x86_64__) && defined(__GNUC__)
#define VARIANT _avx2
#define TARGET __attribute__((target("avx2,fma")))
#include "kernels.h"
#undef VARIANT
#undef TARGET
#define RUN(name, ...) \
    (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? name##_avx2(__VA_ARGS__) : name##_any(__VA_ARGS__))
#else
#define RUN(name, ...) name##_any(__VA_ARGS__)
#endif

/* Every function returns 0, or 1 when there is no memory for what it has to put aside. */

int ssprop_abs_sum(const float *grad, int64_t samples, int64_t channels, int64_t positions, int last, float *sums,
                   int threads)
{
    return last ? RUN(abs_sum_last, grad, samples * positions, channels, sums, threads)
                : RUN(abs_sum_first, grad, samples, channels, positions, sums, threads);
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
    return RUN(depthwise, grad, input, weight, index, kept, samples, channels, geometry, input_grad, weight_grad, bias_grad,
               threads);
}

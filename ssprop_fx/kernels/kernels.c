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
   apart samples, neighbouring positions, and channels, are in memory, and in the weight input channels and taps. */
typedef struct {
    int64_t in[3], out[3], kernel[3], stride[3], padding[3], dilation[3];
    int64_t grad_sample, grad_position, grad_channel, input_position, input_channel, weight_input, weight_tap;
} Geometry;

/* A convolution: grad (samples, channels, out) in any layout, input (samples, inputs, in) and weight in one of two each, the
   weight contiguous where it is worked on pair by pair; the kept channels. input_grad, laid out as the input, weight_grad, as the
   weight, and bias_grad (channels) may be null; the latter two come as zeros. */
typedef struct {
    const float *grad, *input, *weight;
    const int64_t *index;
    int64_t kept, samples, channels, inputs, groups;
    const Geometry *geometry;
    float *input_grad, *weight_grad, *bias_grad;
    int64_t taps, sample_input; /* of the kernel; elements of a sample */
    int clears; /* input_grad is to become zeros where nothing is written */
} Layer;

/* An output channel and an input channel that it reads, and which of the weight's kernels stands between them. */
typedef struct {
    int64_t output, input, weight;
} Pair;

/* Floats of a cache line, and so many floats in whole ones. */
#define LINE 16
static size_t lines(int64_t floats) { return (size_t)(floats + LINE - 1) / LINE * LINE; }

/* Memory for so many floats that begins with a cache line; whole is what is to be freed, null if there is none. */
static float *aligned(size_t floats, void **whole)
{
    *whole = malloc((floats + LINE) * sizeof(float));
    return (float *)(((uintptr_t)*whole + 63) / 64 * 64);
}

/* Neighbouring positions of the outputs of a 1×1 convolution, of the input of others: which of a strip's they are, and where
   the first of them stands: in grad and input, or in which sample and at which place of the input. */
typedef struct {
    int64_t start, count, grad, input, sample, place[3];
} Run;

/* Positions that are worked on together, with channels last and with channels first; after so many of these strips their sums
   are added to those of the ones before. */
#define ROWS_LAST 12
#define ROWS_FIRST 512
#define FOLDED 64

/* The runs that make count positions, from the first of all samples on; one more ends the list. */
static void find_runs(const Layer *all, int64_t first, int64_t count, Run *runs)
{
    const Geometry *geo = all->geometry;
    const int64_t *in = geo->in, *out = geo->out, *s = geo->stride;
    int64_t outputs = out[0] * out[1] * out[2], inputs = in[0] * in[1] * in[2], done = 0;
    int one = all->taps == 1, strided = one && (s[0] > 1 || s[1] > 1 || s[2] > 1), last = geo->input_channel == 1;
    int64_t positions = one ? outputs : inputs;
    int even = last && geo->grad_sample == outputs * geo->grad_position; /* all samples' positions are one row */
    int64_t width = !one ? in[2] : strided ? out[2] : even ? all->samples * outputs : outputs;
    while (done < count) {
        int64_t sample = (first + done) / positions, p = (first + done) % positions, rest = width - (first + done) % width;
        int64_t z = p / (out[1] * out[2]) * s[0], y = p / out[2] % out[1] * s[1], x = p % out[2] * s[2];
        int64_t seen = strided ? (z * in[1] + y) * in[2] + x : p;
        runs->start = done, runs->count = rest < count - done ? rest : count - done;
        runs->grad = sample * geo->grad_sample + p * geo->grad_position;
        runs->input = sample * all->sample_input + seen * geo->input_position;
        runs->sample = sample;
        runs->place[0] = seen / (in[1] * in[2]), runs->place[1] = seen / in[2] % in[1], runs->place[2] = seen % in[2];
        done += runs++->count;
    }
    runs->start = count;
}

/* Rows of few channels that are worked on as one, or vectors would be mostly empty. */
static int64_t rows_together(int64_t channels, int64_t rows)
{
    int64_t together = 1;
    while (channels * together < 64 && rows >= 64 * together) together *= 2;
    return together;
}

#define SIX 6 /* rows of a product that are computed side by side */

#define JOIN(a, b) a##b
#define NAME_(name, variant) JOIN(name, variant)
#define NAME(name) NAME_(name, VARIANT)

#define VARIANT _any
#define TARGET
#define BYTES 32
#include "loops.h"
#include "direct.h"
#include "products.h"
#include "stem.h"

#if defined(__x86_64__) && defined(__GNUC__)
#undef VARIANT
#undef TARGET
#define VARIANT _avx2
#define TARGET __attribute__((target("avx2,fma")))
#include "loops.h"
#include "direct.h"
#include "products.h"
#include "stem.h"

#undef VARIANT
#undef TARGET
#undef BYTES
#define VARIANT _avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#define BYTES 64
#include "loops.h"
#include "direct.h"
#include "products.h"
#include "stem.h"

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
int ssprop_version(void) { return 6; }

/* Every other function returns 0, or 1 when there is no memory for what it has to put aside. */

/* Sums of |grad| over samples and positions. sample, position and channel: how far apart neighbouring ones are in memory. Either
   channels lie side by side, and the positions of all samples are equally far apart, or positions lie side by side. */
int ssprop_abs_sum(const float *grad, int64_t samples, int64_t channels, int64_t positions, int64_t sample, int64_t position,
                   int64_t channel, float *sums, int threads)
{
    return channel == 1 ? RUN(abs_sum_last, grad, samples * positions, position, channels, sums, threads)
                        : RUN(abs_sum_first, grad, samples, sample, channels, channel, positions, sums, threads);
}

/* Sums over rows of (rows, channels), of (1 + number, channels): of grad, and of grad · (input − mean) for each input. */
int ssprop_centered_sums(const float *grad, const float *const *inputs, const float *const *means, int64_t number, int64_t rows,
                         int64_t channels, float *sums, int threads)
{
    return RUN(centered_sums, grad, inputs, means, number, rows, channels, sums, threads);
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

static int direct(const Layer *all, int threads)
{
    int64_t kept = all->kept, per_group = all->inputs / all->groups;
    Pair *pairs = malloc((size_t)(kept * per_group) * sizeof(Pair)), *pair = pairs;
    if (!pairs) return 1;
    /* pairs that are worked on side by side read different channels of whichever there are more */
    int64_t outer = kept < per_group ? kept : per_group, inner = kept < per_group ? per_group : kept;
    for (int64_t i = 0; i < outer; i++)
        for (int64_t j = 0; j < inner; j++, pair++) {
            int64_t output = all->index[kept < per_group ? i : j], c = kept < per_group ? j : i;
            pair->output = output, pair->input = output / (all->channels / all->groups) * per_group + c;
            pair->weight = output * per_group + c;
        }
    int failed = RUN(direct, all, pairs, threads);
    free(pairs);
    return failed;
}

static int products(Layer all, int threads) /* group by group */
{
    int64_t kept = all.kept / all.groups, inputs = all.inputs / all.groups, step = inputs * all.geometry->input_channel;
    all.kept = kept, all.inputs = inputs;
    for (int64_t group = 0; group < all.groups; group++) {
        all.clears = !group;
        if (RUN(products, &all, threads)) return 1;
        all.index += kept, all.input += step, all.input_grad = all.input_grad ? all.input_grad + step : 0;
    }
    return 0;
}

/* Gradients of a convolution from some of its output channels, by one of three loops; see Layer for the arguments. */
int ssprop_gradients(int loop, const float *grad, const float *input, const float *weight, const int64_t *index, int64_t kept,
                     int64_t samples, int64_t channels, int64_t inputs, int64_t groups, const Geometry *geometry,
                     float *input_grad, float *weight_grad, float *bias_grad, int threads)
{
    enum { DIRECT, STEM, PRODUCTS }; /* as in native.py */
    const int64_t *k = geometry->kernel, *in = geometry->in;
    Layer all = {
        .grad = grad, .input = input, .weight = weight, .index = index, .geometry = geometry,
        .kept = kept, .samples = samples, .channels = channels, .inputs = inputs, .groups = groups,
        .input_grad = input_grad, .weight_grad = weight_grad, .bias_grad = bias_grad,
        .taps = k[0] * k[1] * k[2], .sample_input = inputs * in[0] * in[1] * in[2], .clears = 1,
    };
    return loop == DIRECT ? direct(&all, threads) : loop == STEM ? RUN(stem, &all, threads) : products(all, threads);
}

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
    /* of products: how far apart neighbouring places of the input are along each dimension, and of the weight its outputs, and
       neighbouring taps along each dimension; whether they are products of columns, and grad has the kept channels alone */
    int64_t apart[3], weight_output, tap[3];
    int columns, taken;
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

/* Neighbouring places of the outputs of a 1×1 convolution, of the input of others: which of a strip's they are, and where
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
    const int64_t *grid = all->columns ? geo->in : geo->out, *apart = all->apart;
    int64_t positions = grid[0] * grid[1] * grid[2], done = 0;
    int plain = !all->columns && geo->stride[0] == 1 && geo->stride[1] == 1 && geo->stride[2] == 1;
    /* all samples' positions are one row */
    int even = plain && geo->input_channel == 1 && geo->grad_sample == positions * geo->grad_position;
    int64_t width = even ? all->samples * positions : plain ? positions : grid[2];
    while (done < count) {
        int64_t sample = (first + done) / positions, p = (first + done) % positions, rest = width - (first + done) % width;
        int64_t z = p / (grid[1] * grid[2]), y = p / grid[2] % grid[1], x = p % grid[2];
        runs->start = done, runs->count = rest < count - done ? rest : count - done;
        runs->grad = sample * geo->grad_sample + p * geo->grad_position;
        runs->input = sample * all->sample_input + z * apart[0] + y * apart[1] + x * apart[2];
        runs->sample = sample, runs->place[0] = z, runs->place[1] = y, runs->place[2] = x;
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
/* for so many channels side by side, of which the widest vectors may be half empty */
#define RUN_NARROW(name, channels, ...) \
    (vectors() == 64 && (channels) <= 16 ? name##_avx2(__VA_ARGS__) : RUN(name, __VA_ARGS__))
#else
#define RUN(name, ...) name##_any(__VA_ARGS__)
#define RUN_NARROW(name, channels, ...) RUN(name, __VA_ARGS__)
#endif

/* Of what the functions take and can do, as in native.py. */
int ssprop_version(void) { return 7; }

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
    int failed = RUN_NARROW(direct, kept * per_group, all, pairs, threads);
    free(pairs);
    return failed;
}

static void clear(float *values, int64_t count, int threads)
{
#pragma omp parallel num_threads(threads)
    {
        int64_t thread = omp_get_thread_num(), team = omp_get_num_threads(), first = count * thread / team;
        memset(values + first, 0, (size_t)(count * (thread + 1) / team - first) * sizeof(float));
    }
}

static int group_by_group(Layer all, int threads)
{
    int64_t step = all.inputs * all.geometry->input_channel;
    for (int64_t group = 0; group < all.groups; group++) {
        if (RUN(products, &all, threads)) return 1;
        all.index += all.kept, all.input += step, all.input_grad = all.input_grad ? all.input_grad + step : 0;
        if (all.taken) all.grad += all.kept;
    }
    return 0;
}

/* Along one dimension, the convolution of every stride-th place of the input from the one at remainder on, an unstrided one of
   those taps that read there. Returns the first of these taps, or -1 if there is none; step becomes how many taps on the next is. */
static int64_t part_of(Geometry *geo, int i, int64_t remainder, int64_t *step)
{
    int64_t s = geo->stride[i], p = geo->padding[i], d = geo->dilation[i], k = geo->kernel[i], first = 0;
    for (*step = 1; *step * d % s; ++*step) {}
    while (first < k && (remainder + p - first * d) % s) first++;
    if (first == k) return -1;
    geo->kernel[i] = (k - first + *step - 1) / *step;
    geo->padding[i] = (remainder + p - first * d) / s;
    geo->dilation[i] = *step * d / s;
    geo->stride[i] = 1;
    /* what no output reads any more is left out: it need not be finite */
    int64_t places = (geo->in[i] - remainder + s - 1) / s;
    int64_t read = geo->out[i] - geo->padding[i] + (geo->kernel[i] - 1) * geo->dilation[i];
    geo->in[i] = places < read ? places : read;
    return geo->in[i] > 0 ? first : -1;
}

static int products(Layer all, int threads)
{
    const Geometry *geo = all.geometry;
    const int64_t *in = geo->in, *s = geo->stride, *k = geo->kernel;
    int64_t steps[3] = {in[1] * in[2] * geo->input_position, in[2] * geo->input_position, geo->input_position};
    int64_t taps[3] = {k[1] * k[2] * geo->weight_tap, k[2] * geo->weight_tap, geo->weight_tap};
    int64_t kept = all.kept, outputs = geo->out[0] * geo->out[1] * geo->out[2], at[3], step, first, read = 1;
    int failed = 0;
    all.columns = all.taps > 1, all.weight_output = all.inputs / all.groups * all.taps;
    for (int i = 0; i < 3; i++) {
        int64_t places = all.columns ? 0 : geo->out[i]; /* that some output reads */
        for (at[i] = 0; all.columns && at[i] < s[i]; at[i]++) {
            Geometry part = *geo;
            places += part_of(&part, i, at[i], &step) < 0 ? 0 : part.in[i];
        }
        all.apart[i] = steps[i] * s[i], read *= places;
    }
    if (all.input_grad && read < in[0] * in[1] * in[2]) clear(all.input_grad, all.samples * all.sample_input, threads);
    if (!all.columns) {
        all.kept /= all.groups, all.inputs /= all.groups;
        return group_by_group(all, threads);
    }
    void *whole = 0;
    all.taken = geo->input_channel == 1; /* the kept channels are copied out once, not for every tap */
    float *taken = all.taken ? aligned((size_t)(all.samples * outputs * kept), &whole) : 0;
    if (all.taken && !whole) return 1;
    RUN(prepare, &all, taken, threads);
    all.kept /= all.groups, all.inputs /= all.groups, all.bias_grad = 0;
    Geometry packed = *geo;
    if (all.taken) {
        all.grad = taken;
        packed.grad_sample = outputs * kept, packed.grad_position = kept, packed.grad_channel = 1;
    }
    for (at[0] = 0; at[0] < s[0]; at[0]++)
        for (at[1] = 0; at[1] < s[1]; at[1]++)
            for (at[2] = 0; at[2] < s[2] && !failed; at[2]++) {
                Geometry part_geometry = packed;
                Layer part = all;
                int64_t place = 0, tap = 0, none = 0;
                for (int i = 0; i < 3; i++) {
                    first = part_of(&part_geometry, i, at[i], &step);
                    none = none || first < 0, place += at[i] * steps[i], tap += first * taps[i], part.tap[i] = step * taps[i];
                }
                if (none) continue;
                part.geometry = &part_geometry, part.input += place, part.weight += tap;
                part.taps = part_geometry.kernel[0] * part_geometry.kernel[1] * part_geometry.kernel[2];
                if (part.input_grad) part.input_grad += place;
                if (part.weight_grad) part.weight_grad += tap;
                failed = group_by_group(part, threads);
            }
    free(whole);
    return failed;
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
        .taps = k[0] * k[1] * k[2], .sample_input = inputs * in[0] * in[1] * in[2],
    };
    if (loop == STEM) return RUN_NARROW(stem, all.kept, &all, threads);
    return loop == DIRECT ? direct(&all, threads) : products(all, threads);
}

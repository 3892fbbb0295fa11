/* The loops of kernels.c, for one kind of processor: TARGET is a function's attribute, NAME adds the kind to a name, BYTES are
   those of a vector. */

typedef float NAME(Vector) __attribute__((vector_size(BYTES), aligned(sizeof(float))));

/* Channels that are computed side by side, in two vectors. */
#define LANES (2 * BYTES / (int)sizeof(float))

/* Sums of |grad| over the rows of (rows, channels), apart from each other, in single precision for a few hundred rows, then in
   double. */
TARGET static int NAME(abs_sum_last)(const float *grad, int64_t rows, int64_t apart, int64_t channels, float *sums, int threads)
{
    enum { ROWS = 256, WIDTH = 8 };
    /* few channels: several rows are one, or vectors would be mostly empty */
    int64_t together = 1;
    while (apart == channels && channels * together < 8 * WIDTH && rows >= 64 * together) together *= 2;
    int64_t width = channels * together, wide = rows / together, next = apart * together;
    double *totals = calloc((size_t)(threads * width), sizeof(double));
    float *parts = calloc((size_t)(threads * width), sizeof(float));
    if (!totals || !parts) {
        free(totals), free(parts);
        return 1;
    }
#pragma omp parallel num_threads(threads)
    {
        int64_t thread = omp_get_thread_num(), team = omp_get_num_threads(); /* may be fewer than were asked for */
        double *restrict total = totals + thread * width;
        float *restrict part = parts + thread * width;
        int64_t begin = wide * thread / team, end = wide * (thread + 1) / team;
        for (int64_t first = begin; first < end; first += ROWS) {
            int64_t last = first + ROWS < end ? first + ROWS : end;
            int64_t c = 0;
            for (; c + 8 * WIDTH <= width; c += 8 * WIDTH) {
                float lanes[8 * WIDTH] = {0};
                for (int64_t r = first; r < last; r++) {
                    const float *restrict row = grad + r * next + c;
                    for (int j = 0; j < 8 * WIDTH; j++) lanes[j] += fabsf(row[j]);
                }
                for (int j = 0; j < 8 * WIDTH; j++) total[c + j] += lanes[j];
            }
            if (c < width) {
                for (int64_t j = c; j < width; j++) part[j] = 0;
                for (int64_t r = first; r < last; r++) {
                    const float *restrict row = grad + r * next;
                    for (int64_t j = c; j < width; j++) part[j] += fabsf(row[j]);
                }
                for (int64_t j = c; j < width; j++) total[j] += part[j];
            }
        }
    }
    for (int64_t r = wide * together; r < rows; r++)
        for (int64_t c = 0; c < channels; c++) totals[c] += fabsf(grad[r * apart + c]);
    for (int64_t c = 0; c < channels; c++) {
        double sum = 0;
        for (int64_t i = c; i < threads * width; i += channels) sum += totals[i];
        sums[c] = (float)sum;
    }
    free(totals), free(parts);
    return 0;
}

/* The same of (samples, channels, positions), samples and channels as far apart as sample and channel say. */
TARGET static int NAME(abs_sum_first)(const float *grad, int64_t samples, int64_t sample, int64_t channels, int64_t channel,
                                      int64_t positions, float *sums, int threads)
{
    enum { WIDTH = 32, RUN_LENGTH = 8192 };
    double *totals = malloc((size_t)(samples * channels) * sizeof(double));
    if (!totals) return 1;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t plane = 0; plane < samples * channels; plane++) {
        const float *restrict values = grad + plane / channels * sample + plane % channels * channel;
        double total = 0;
        for (int64_t first = 0; first < positions; first += RUN_LENGTH) {
            int64_t last = first + RUN_LENGTH < positions ? first + RUN_LENGTH : positions, i = first;
            float lanes[WIDTH] = {0}, rest = 0;
            for (; i + WIDTH <= last; i += WIDTH)
                for (int j = 0; j < WIDTH; j++) lanes[j] += fabsf(values[i + j]);
            for (; i < last; i++) rest += fabsf(values[i]);
            for (int j = 0; j < WIDTH; j++) total += lanes[j];
            total += rest;
        }
        totals[plane] = total;
    }
    for (int64_t c = 0; c < channels; c++) {
        double sum = 0;
        for (int64_t n = 0; n < samples; n++) sum += totals[n * channels + c];
        sums[c] = (float)sum;
    }
    free(totals);
    return 0;
}

/* (rows, channels) -> (rows, kept). */
TARGET static int NAME(take_last)(const float *restrict values, int64_t rows, int64_t channels, const int64_t *index,
                                  int64_t kept, float *restrict taken, int threads)
{
    int32_t *at = malloc((size_t)kept * sizeof(int32_t));
    if (!at) return 1;
    for (int64_t j = 0; j < kept; j++) at[j] = (int32_t)index[j];
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        const float *restrict from = values + r * channels;
        float *restrict to = taken + r * kept;
        for (int64_t j = 0; j < kept; j++) to[j] = from[at[j]];
    }
    free(at);
    return 0;
}

/* How the offsets of LANES channels lie: all the same, one after another, or in any way. */
enum { NAME(ANY), NAME(SAME), NAME(NEXT) };
TARGET static inline int NAME(lie)(const int64_t *at, int lanes)
{
    int same = lanes == LANES, next = same;
    for (int j = 1; j < lanes; j++) same = same && at[j] == at[0], next = next && at[j] == at[0] + j;
    return next ? NAME(NEXT) : same ? NAME(SAME) : NAME(ANY);
}

/* Values of up to LANES channels side by side, from any layout: (positions, LANES). at holds each channel's offset. */
TARGET static inline void NAME(pick)(const float *restrict from, int64_t positions, int64_t step, const int64_t *restrict at,
                                     int lanes, float *restrict to)
{
    int how = NAME(lie)(at, lanes);
    if (how == NAME(NEXT))
        for (int64_t p = 0; p < positions; p++)
            for (int j = 0; j < LANES; j++) to[p * LANES + j] = from[p * step + at[0] + j];
    else if (how == NAME(SAME))
        for (int64_t p = 0; p < positions; p++)
            for (int j = 0; j < LANES; j++) to[p * LANES + j] = from[p * step + at[0]];
    else if (step == 1) /* a cache line of each channel, or planes a power of two apart drive each other out of the cache */
        for (int64_t first = 0; first < positions; first += 16) {
            int64_t last = first + 16 < positions ? first + 16 : positions;
            for (int j = 0; j < lanes; j++)
                for (int64_t p = first; p < last; p++) to[p * LANES + j] = from[p + at[j]];
        }
    else if (lanes == LANES)
        for (int64_t p = 0; p < positions; p++)
            for (int j = 0; j < LANES; j++) to[p * LANES + j] = from[p * step + at[j]];
    else
        for (int64_t p = 0; p < positions; p++)
            for (int j = 0; j < lanes; j++) to[p * LANES + j] = from[p * step + at[j]];
}

/* The way back, added to what is there: rows of the input are in two strips if both see them. */
TARGET static inline void NAME(put)(const float *restrict from, int64_t positions, int64_t step, const int64_t *restrict at,
                                    int lanes, float *restrict to)
{
    int how = NAME(lie)(at, lanes);
    if (how == NAME(NEXT))
        for (int64_t p = 0; p < positions; p++)
            for (int j = 0; j < LANES; j++) to[p * step + at[0] + j] += from[p * LANES + j];
    else if (step == 1)
        for (int64_t first = 0; first < positions; first += 16) {
            int64_t last = first + 16 < positions ? first + 16 : positions;
            for (int j = 0; j < lanes; j++)
                for (int64_t p = first; p < last; p++) to[p + at[j]] += from[p * LANES + j];
        }
    else
        for (int64_t p = 0; p < positions; p++)
            for (int j = 0; j < lanes; j++) to[p * step + at[j]] += from[p * LANES + j];
}

/* One tap of the kernel at count outputs of a row: its part of the weight's gradient, and of the input's if that is wanted. */
TARGET static inline void NAME(tap)(const NAME(Vector) *restrict g, const NAME(Vector) *restrict x, NAME(Vector) *restrict dx,
                                    const NAME(Vector) *restrict w, NAME(Vector) *restrict dw, int64_t count, int64_t step)
{
    NAME(Vector) low = dw[0], high = dw[1], w_low = w[0], w_high = w[1];
    if (dx)
        for (int64_t o = 0; o < count; o++) {
            NAME(Vector) g_low = g[2 * o], g_high = g[2 * o + 1];
            low += g_low * x[2 * o * step], high += g_high * x[2 * o * step + 1];
            dx[2 * o * step] += g_low * w_low, dx[2 * o * step + 1] += g_high * w_high;
        }
    else
        for (int64_t o = 0; o < count; o++)
            low += g[2 * o] * x[2 * o * step], high += g[2 * o + 1] * x[2 * o * step + 1];
    dw[0] = low, dw[1] = high;
}

/* Rows first to last of all channels of a sample's input gradient, set to zero. */
TARGET static inline void NAME(clear)(float *sample, int64_t channels, const Geometry *geo, int64_t first, int64_t last)
{
    int64_t plane = geo->in[0] * geo->in[1] * geo->in[2], width = geo->in[2];
    if (geo->input_channel == 1)
        memset(sample + first * width * channels, 0, (size_t)((last - first) * width * channels) * sizeof(float));
    else
        for (int64_t c = 0; c < channels; c++)
            memset(sample + c * plane + first * width, 0, (size_t)((last - first) * width) * sizeof(float));
}

/* What rows top to bottom of the outputs of one sample, in plane oz, add for up to LANES pairs. memory has room for these rows
   of grad, for those of the input that they see, twice, and for the weight; dw and db are sums. */
TARGET static void NAME(direct_rows)(const Layer *all, int64_t sample, const Pair *pairs, int lanes, int64_t oz, int64_t top,
                                     int64_t bottom, float *memory, float *dw, float *db)
{
    const Geometry *geo = all->geometry;
    const int64_t *in = geo->in, *out = geo->out, *k = geo->kernel, *s = geo->stride, *p = geo->padding, *d = geo->dilation;
    int64_t taps = all->taps, count = (bottom - top) * out[2];
    /* rows of the input that these outputs see */
    int64_t first = top * s[1] - p[1], last = (bottom - 1) * s[1] - p[1] + (k[1] - 1) * d[1] + 1;
    first = first < 0 ? 0 : first, last = last > in[1] ? in[1] : last;
    int64_t size = first < last ? (last - first) * in[2] : 0;
    float *w = memory, *g = w + taps * LANES, *x = g + count * LANES, *dx = x + size * LANES;

    int64_t at_grad[LANES] = {0}, at_input[LANES] = {0}, at_weight[LANES] = {0};
    for (int j = 0; j < lanes; j++) {
        at_grad[j] = pairs[j].output * geo->grad_channel;
        at_input[j] = pairs[j].input * geo->input_channel;
        at_weight[j] = pairs[j].weight * taps;
    }
    /* lanes beyond the last pair are computed with, too, and not read: zeros are quick */
    if (lanes < LANES) memset(memory, 0, (size_t)((taps + count + 2 * size) * LANES) * sizeof(float));
    NAME(pick)(all->weight, taps, 1, at_weight, lanes, w);
    NAME(pick)(all->grad + sample * geo->grad_sample + (oz * out[1] + top) * out[2] * geo->grad_position, count,
               geo->grad_position, at_grad, lanes, g);
    NAME(Vector) low = {0}, high = {0};
    for (int64_t o = 0; o < count; o++) low += ((NAME(Vector) *)g)[2 * o], high += ((NAME(Vector) *)g)[2 * o + 1];
    ((NAME(Vector) *)db)[0] += low, ((NAME(Vector) *)db)[1] += high;

    for (int64_t a = 0; a < k[0] && size; a++) {
        int64_t iz = oz * s[0] - p[0] + a * d[0];
        if (iz < 0 || iz >= in[0]) continue;
        int64_t offset = sample * all->sample_input + (iz * in[1] + first) * in[2] * geo->input_position;
        NAME(pick)(all->input + offset, size, geo->input_position, at_input, lanes, x);
        if (all->input_grad) memset(dx, 0, (size_t)(size * LANES) * sizeof(float));
        for (int64_t oy = top; oy < bottom; oy++)
            for (int64_t b = 0; b < k[1]; b++) {
                int64_t iy = oy * s[1] - p[1] + b * d[1];
                if (iy < 0 || iy >= in[1]) continue;
                for (int64_t c = 0; c < k[2]; c++) {
                    /* outputs for which the tap lies inside of the input */
                    int64_t shift = c * d[2] - p[2], from = shift < 0 ? (-shift + s[2] - 1) / s[2] : 0;
                    int64_t to = shift < in[2] ? (in[2] - shift - 1) / s[2] + 1 : 0;
                    to = to > out[2] ? out[2] : to;
                    if (from >= to) continue;
                    int64_t tap = (a * k[1] + b) * k[2] + c;
                    int64_t place = ((iy - first) * in[2] + from * s[2] + shift) * LANES;
                    NAME(tap)((NAME(Vector) *)(g + ((oy - top) * out[2] + from) * LANES), (NAME(Vector) *)(x + place),
                              all->input_grad ? (NAME(Vector) *)(dx + place) : 0, (NAME(Vector) *)(w + tap * LANES),
                              (NAME(Vector) *)(dw + tap * LANES), to - from, s[2]);
                }
            }
        if (all->input_grad) NAME(put)(dx, size, geo->input_position, at_input, lanes, all->input_grad + offset);
    }
}

/* All rows of outputs of one sample for some pairs, in strips whose data stays in the cache. clears: no other task writes to
   the sample's input gradient, and its rows become zeros just before they are added to. */
TARGET static void NAME(direct_sample)(const Layer *all, int64_t sample, const Pair *pairs, int64_t count, int64_t strip,
                                       int clears, float *memory, float *parts, float *sums)
{
    const Geometry *geo = all->geometry;
    const int64_t *in = geo->in, *out = geo->out, *k = geo->kernel;
    int64_t taps = all->taps, cleared = 0;
    float *own = all->input_grad ? all->input_grad + sample * all->sample_input : 0;
    clears = clears && own;
    if (clears && in[0] > 1) { /* planes are seen from several others */
        NAME(clear)(own, all->inputs, geo, 0, in[0] * in[1]);
        clears = 0;
    }
    for (int64_t oz = 0; oz < out[0]; oz++)
        for (int64_t top = 0; top < out[1]; top += strip) {
            int64_t bottom = top + strip < out[1] ? top + strip : out[1];
            int64_t last = (bottom - 1) * geo->stride[1] - geo->padding[1] + (k[1] - 1) * geo->dilation[1] + 1;
            last = bottom == out[1] || last > in[1] ? in[1] : last;
            if (clears && last > cleared) {
                NAME(clear)(own, all->inputs, geo, cleared, last);
                cleared = last;
            }
            for (int64_t first = 0; first < count; first += LANES) {
                float *dw = sums + first * (taps + 1);
                int lanes = (int)(count - first < LANES ? count - first : LANES);
                /* of the strip: a sum over all positions would lose what is small beside it */
                memset(parts, 0, (size_t)((taps + 1) * LANES) * sizeof(float));
                NAME(direct_rows)(all, sample, pairs + first, lanes, oz, top, bottom, memory, parts, parts + taps * LANES);
                for (int64_t i = 0; i < (taps + 1) * LANES; i++) dw[i] += parts[i];
            }
        }
}

/* Gradients of a convolution from its kept channels, pair by pair; see Layer for the arguments. */
TARGET static int NAME(direct)(const Layer *all, const Pair *pairs, int threads)
{
    const Geometry *geo = all->geometry;
    const int64_t *in = geo->in, *out = geo->out, *k = geo->kernel;
    int64_t per_group = all->inputs / all->groups, count = all->kept * per_group, blocks = (count + LANES - 1) / LANES;
    int64_t taps = all->taps, reach = (k[1] - 1) * geo->dilation[1] + 1;
    /* as many rows of outputs as have their part of grad, input and input_grad in 128 KiB, one at least */
    int64_t strip = (128 * 1024 / (int64_t)(sizeof(float) * LANES) - 2 * reach * in[2]) / (2 * geo->stride[1] * in[2] + out[2]);
    strip = strip < 1 ? 1 : strip > out[1] ? out[1] : strip;
    int64_t in_rows = (strip - 1) * geo->stride[1] + reach;
    in_rows = in_rows > in[1] ? in[1] : in_rows;
    size_t sums = (size_t)(blocks * (taps + 1) * LANES);
    size_t floats = sums + (size_t)(LANES * (2 * in_rows * in[2] + strip * out[2] + 2 * taps + 1));
    float *memory = malloc((size_t)threads * floats * sizeof(float));
    if (!memory) return 1;
    for (int thread = 0; thread < threads; thread++) memset(memory + (size_t)thread * floats, 0, sums * sizeof(float));
    /* a task is a sample; where there are too few of them, LANES pairs of it, if no two write to the same place */
    int apart = !all->input_grad || (per_group == 1 && all->channels == all->inputs);
    int64_t parts = apart && all->samples < 2 * threads && all->samples % threads ? blocks : 1;
#pragma omp parallel num_threads(threads)
    {
        float *own = memory + (size_t)omp_get_thread_num() * floats;
        if (all->input_grad && parts > 1) {
#pragma omp for schedule(static)
            for (int64_t plane = 0; plane < all->samples * all->inputs; plane++)
                memset(all->input_grad + plane * in[0] * in[1] * in[2], 0, (size_t)(in[0] * in[1] * in[2]) * sizeof(float));
        }
#pragma omp for schedule(static)
        for (int64_t task = 0; task < all->samples * parts; task++) {
            int64_t first = parts > 1 ? task % parts * LANES : 0;
            int64_t some = parts > 1 && count - first > LANES ? LANES : count - first;
            NAME(direct_sample)(all, task / parts, pairs + first, some, strip, parts == 1, own + sums,
                                own + floats - (taps + 1) * LANES, own + first * (taps + 1));
        }
    }
    for (int64_t j = 0; j < count; j++)
        for (int64_t tap = 0; tap <= taps; tap++) {
            double sum = 0;
            for (int thread = 0; thread < threads; thread++)
                sum += memory[(size_t)thread * floats + (size_t)((j / LANES * (taps + 1) + tap) * LANES + j % LANES)];
            if (tap < taps && all->weight_grad) all->weight_grad[pairs[j].weight * taps + tap] = (float)sum;
            if (tap == taps && all->bias_grad) all->bias_grad[pairs[j].output] = (float)sum;
        }
    free(memory);
    return 0;
}

/* Gradients of a convolution from its kept channels, pair by pair: each pair of an output channel and an input channel that it
   reads by itself, LANES of them, a block, side by side. */

typedef struct {
    const Layer *layer;
    const int64_t *at_grad, *at_input; /* where each pair's channels are in grad and input */
    const float *weight;               /* (blocks, taps, LANES) */
    int64_t strip, chunk;              /* rows of outputs, and blocks, that are worked on together */
} NAME(Direct);

/* Values of count pairs' channels, from any layout: (blocks, positions, LANES). near: channels lie side by side. */
TARGET static inline void NAME(take)(const float *restrict from, int64_t positions, int64_t step, int near,
                                     const int64_t *restrict at, int64_t count, float *restrict to)
{
    int64_t whole = count / LANES * LANES;
    int rest = (int)(count - whole);
    /* lanes beyond the last pair are computed with, too, and not read: zeros are quick */
    if (rest) memset(to + whole * positions, 0, (size_t)(positions * LANES) * sizeof(float));
    if (near) /* all pairs of a position, or its cache lines come again for every block */
        for (int64_t p = 0; p < positions; p++) {
            const float *restrict row = from + p * step;
            for (int64_t i = 0; i < whole; i += LANES)
                for (int j = 0; j < LANES; j++) to[i * positions + p * LANES + j] = row[at[i + j]];
            for (int j = 0; j < rest; j++) to[whole * positions + p * LANES + j] = row[at[whole + j]];
        }
    else
        for (int64_t i = 0; i < count; i += LANES)
            NAME(pick)(from, positions, step, at + i, i < whole ? LANES : rest, to + i * positions);
}

/* The way back, added to what is there: a channel may be in several pairs, and a row of the input in two strips. near: channels
   lie side by side, and from position fresh on all of them become zeros first. */
TARGET static inline void NAME(put)(const float *restrict from, int64_t positions, int64_t step, int near, int64_t fresh,
                                    const int64_t *restrict at, int64_t count, float *restrict to)
{
    int64_t whole = count / LANES * LANES;
    if (!near)
        for (int64_t i = 0; i < count; i += LANES, from += positions * LANES) {
            int lanes = (int)(count - i < LANES ? count - i : LANES);
            for (int64_t first = 0; first < positions; first += 16) { /* see pick */
                int64_t last = first + 16 < positions ? first + 16 : positions;
                for (int j = 0; j < lanes; j++)
                    for (int64_t p = first; p < last; p++) to[p + at[i + j]] += from[p * LANES + j];
            }
        }
    else
        for (int64_t p = 0; p < positions; p++) {
            float *row = to + p * step;
            const float *values = from + p * LANES;
            if (p >= fresh) memset(row, 0, (size_t)step * sizeof(float));
            for (int64_t i = 0; i < whole; i += LANES)
                for (int j = 0; j < LANES; j++) row[at[i + j]] += values[i * positions + j];
            for (int64_t i = whole; i < count; i++) row[at[i]] += values[whole * positions + i - whole];
        }
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

/* Rows of the input, first to last, that rows top to bottom of the outputs see; there may be none. */
TARGET static inline void NAME(seen)(const Geometry *geo, int64_t top, int64_t bottom, int64_t *first, int64_t *last)
{
    int64_t reach = (geo->kernel[1] - 1) * geo->dilation[1] + 1, rows = geo->in[1];
    int64_t begin = top * geo->stride[1] - geo->padding[1], end = (bottom - 1) * geo->stride[1] - geo->padding[1] + reach;
    *first = begin < 0 ? 0 : begin > rows ? rows : begin;
    *last = end < *first ? *first : end > rows ? rows : end;
}

/* The taps of plane a of the kernel, in one block: g (rows top to bottom of the outputs, LANES), x and dx (rows of the input from
   first on, LANES), w and dw (taps of the plane, LANES). */
TARGET static void NAME(plane)(const Geometry *geo, int64_t top, int64_t bottom, int64_t first, const float *g, const float *x,
                               float *dx, const float *w, float *dw)
{
    const int64_t *in = geo->in, *out = geo->out, *k = geo->kernel, *s = geo->stride, *p = geo->padding, *d = geo->dilation;
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
                int64_t tap = (b * k[2] + c) * LANES, place = ((iy - first) * in[2] + from * s[2] + shift) * LANES;
                NAME(tap)((NAME(Vector) *)(g + ((oy - top) * out[2] + from) * LANES), (NAME(Vector) *)(x + place),
                          dx ? (NAME(Vector) *)(dx + place) : 0, (NAME(Vector) *)(w + tap), (NAME(Vector) *)(dw + tap),
                          to - from, s[2]);
            }
        }
}

/* What rows top to bottom of the outputs of one sample, in plane oz, add for a chunk of pairs. memory has room for these rows of
   grad, for those of the input that they see, twice, and for one block's weights; sums are (blocks, taps + 1, LANES). cleared:
   from this row of the input on, its gradient is to become zeros. */
TARGET static void NAME(direct_rows)(const NAME(Direct) *work, int64_t sample, int64_t pair, int64_t count, int64_t oz,
                                     int64_t top, int64_t bottom, int64_t cleared, float *memory, float *sums)
{
    const Layer *all = work->layer;
    const Geometry *geo = all->geometry;
    const int64_t *in = geo->in, *out = geo->out, *k = geo->kernel, *s = geo->stride, *p = geo->padding, *d = geo->dilation;
    int64_t taps = all->taps, of_plane = k[1] * k[2], outputs = (bottom - top) * out[2];
    int64_t width = (count + LANES - 1) / LANES * LANES;
    int64_t first, last;
    NAME(seen)(geo, top, bottom, &first, &last);
    int64_t size = (last - first) * in[2];
    float *parts = memory, *g = parts + of_plane * LANES, *x = g + width * outputs, *dx = x + width * size;

    NAME(take)(all->grad + sample * geo->grad_sample + (oz * out[1] + top) * out[2] * geo->grad_position, outputs,
               geo->grad_position, geo->grad_channel == 1, work->at_grad + pair, count, g);
    for (int64_t i = 0; i < width; i += LANES) {
        NAME(Vector) low = {0}, high = {0}, *values = (NAME(Vector) *)(g + i * outputs);
        for (int64_t o = 0; o < outputs; o++) low += values[2 * o], high += values[2 * o + 1];
        NAME(Vector) *sum = (NAME(Vector) *)(sums + i * (taps + 1) + taps * LANES);
        sum[0] += low, sum[1] += high;
    }
    for (int64_t a = 0; a < k[0] && size; a++) {
        int64_t iz = oz * s[0] - p[0] + a * d[0];
        if (iz < 0 || iz >= in[0]) continue;
        int64_t offset = sample * all->sample_input + (iz * in[1] + first) * in[2] * geo->input_position;
        NAME(take)(all->input + offset, size, geo->input_position, geo->input_channel == 1, work->at_input + pair, count, x);
        if (all->input_grad) memset(dx, 0, (size_t)(size * width) * sizeof(float));
        for (int64_t i = 0; i < width; i += LANES) {
            float *sum = sums + i * (taps + 1) + a * of_plane * LANES;
            /* of the strip: a sum over all positions would lose what is small beside it */
            memset(parts, 0, (size_t)(of_plane * LANES) * sizeof(float));
            NAME(plane)(geo, top, bottom, first, g + i * outputs, x + i * size, all->input_grad ? dx + i * size : 0,
                        work->weight + (pair + i) * taps + a * of_plane * LANES, parts);
            for (int64_t j = 0; j < of_plane * LANES; j++) sum[j] += parts[j];
        }
        if (all->input_grad)
            NAME(put)(dx, size, geo->input_position, geo->input_channel == 1, (cleared - first) * in[2], work->at_input + pair,
                      count, all->input_grad + offset);
    }
}

/* All rows of outputs of one sample for some pairs, strip by strip. clears: no other task writes to the sample's input gradient,
   and its rows become zeros just before they are added to. */
TARGET static void NAME(direct_sample)(const NAME(Direct) *work, int64_t sample, int64_t pair, int64_t count, int clears,
                                       float *memory, float *sums)
{
    const Layer *all = work->layer;
    const Geometry *geo = all->geometry;
    const int64_t *in = geo->in, *out = geo->out;
    int64_t cleared = clears ? 0 : in[1];
    float *own = all->input_grad ? all->input_grad + sample * all->sample_input : 0;
    if (clears && own && (in[0] > 1 || out[0] > 1 || geo->kernel[0] > 1)) { /* several planes see one, or none does */
        NAME(clear)(own, all->inputs, geo, 0, in[0] * in[1]);
        cleared = in[1];
    }
    for (int64_t oz = 0; oz < out[0]; oz++)
        for (int64_t top = 0; top < out[1]; top += work->strip) {
            int64_t bottom = top + work->strip < out[1] ? top + work->strip : out[1], first, last;
            NAME(seen)(geo, top, bottom, &first, &last);
            if (own && first > cleared) NAME(clear)(own, all->inputs, geo, cleared, first), cleared = first;
            if (own && last > cleared && geo->input_channel != 1)
                NAME(clear)(own, all->inputs, geo, cleared, last), cleared = last;
            for (int64_t i = 0; i < count; i += work->chunk * LANES) {
                int64_t some = count - i < work->chunk * LANES ? count - i : work->chunk * LANES;
                NAME(direct_rows)(work, sample, pair + i, some, oz, top, bottom, cleared, memory, sums + i * (all->taps + 1));
                cleared = last > cleared ? last : cleared;
            }
        }
    if (own && cleared < in[1]) NAME(clear)(own, all->inputs, geo, cleared, in[1]);
}

/* See Layer for the arguments. */
TARGET static int NAME(direct)(const Layer *all, const Pair *pairs, int threads)
{
    const Geometry *geo = all->geometry;
    const int64_t *in = geo->in, *out = geo->out, *k = geo->kernel;
    int64_t per_group = all->inputs / all->groups, count = all->kept * per_group, blocks = (count + LANES - 1) / LANES;
    int64_t taps = all->taps, reach = (k[1] - 1) * geo->dilation[1] + 1, strip;
    /* a task is a sample; where there are too few of them, part of its pairs, if no two write to the same place */
    int apart = !all->input_grad || (per_group == 1 && all->channels == all->inputs);
    int64_t parts = apart && all->samples < 2 * threads && all->samples % threads ? threads : 1;
    int64_t width = (blocks + parts - 1) / parts * LANES;
    /* As many rows of outputs as have their part of grad, input and input_grad in half of a usual second cache. With channels last
       all blocks of a sample, whose channels share cache lines; fewer where they leave a few rows only, whose neighbours are read
       again, and one where several tasks write to a sample. */
    int64_t chunk = geo->input_channel == 1 && parts == 1 ? blocks : 1, least = out[1] < 8 ? out[1] : 8;
    for (;; chunk = (chunk + 1) / 2) {
        int64_t positions = 256 * 1024 / (int64_t)(sizeof(float) * LANES) / chunk;
        strip = (positions - 2 * (reach - geo->stride[1]) * in[2]) / (2 * geo->stride[1] * in[2] + out[2]);
        if (chunk == 1 || strip >= least) break;
    }
    strip = strip < 1 ? 1 : strip > out[1] ? out[1] : strip;
    strip = (out[1] + (out[1] + strip - 1) / strip - 1) / ((out[1] + strip - 1) / strip); /* strips of about the same size */
    int64_t in_rows = (strip - 1) * geo->stride[1] + reach;
    in_rows = in_rows > in[1] ? in[1] : in_rows;
    size_t sums = (size_t)(blocks * (taps + 1) * LANES), shared = (size_t)(blocks * taps * LANES);
    size_t floats = sums + (size_t)(LANES * (chunk * (2 * in_rows * in[2] + strip * out[2]) + k[1] * k[2]));
    void *whole;
    float *memory = aligned(shared + (size_t)threads * floats, &whole), *own = memory + shared;
    int64_t *at = malloc((size_t)(2 * count) * sizeof(int64_t));
    if (!whole || !at) {
        free(whole), free(at);
        return 1;
    }
    for (int thread = 0; thread < threads; thread++) memset(own + (size_t)thread * floats, 0, sums * sizeof(float));
    memset(memory, 0, shared * sizeof(float));
    for (int64_t i = 0; i < count; i++) {
        at[i] = pairs[i].output * geo->grad_channel, at[count + i] = pairs[i].input * geo->input_channel;
        for (int64_t tap = 0; tap < taps; tap++)
            memory[(i / LANES * taps + tap) * LANES + i % LANES] = all->weight[pairs[i].weight * taps + tap];
    }
    const NAME(Direct) work = {all, at, at + count, memory, strip, chunk};
#pragma omp parallel num_threads(threads)
    {
        float *mine = own + (size_t)omp_get_thread_num() * floats;
        if (all->input_grad && parts > 1) {
#pragma omp for schedule(static)
            for (int64_t plane = 0; plane < all->samples * all->inputs; plane++)
                memset(all->input_grad + plane * in[0] * in[1] * in[2], 0, (size_t)(in[0] * in[1] * in[2]) * sizeof(float));
        }
#pragma omp for schedule(static)
        for (int64_t task = 0; task < all->samples * parts; task++) {
            int64_t first = task % parts * width, some = count - first < width ? count - first : width;
            if (some > 0)
                NAME(direct_sample)(&work, task / parts, first, some, parts == 1, mine + sums, mine + first * (taps + 1));
        }
    }
    for (int64_t i = 0; i < count; i++)
        for (int64_t tap = 0; tap <= taps; tap++) {
            double sum = 0;
            for (int thread = 0; thread < threads; thread++)
                sum += own[(size_t)thread * floats + (size_t)((i / LANES * (taps + 1) + tap) * LANES + i % LANES)];
            if (tap < taps && all->weight_grad) all->weight_grad[pairs[i].weight * taps + tap] = (float)sum;
            if (tap == taps && all->bias_grad) all->bias_grad[pairs[i].output] = (float)sum;
        }
    free(whole), free(at);
    return 0;
}

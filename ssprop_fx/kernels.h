/* The loops of kernels.c, for one kind of processor: TARGET is a function's attribute, NAME adds the kind to its name. */

/* Sums of |grad| over the rows of (rows, channels), in single precision for a few hundred rows, then in double. */
TARGET static int NAME(abs_sum_last)(const float *grad, int64_t rows, int64_t channels, float *sums, int threads)
{
    enum { ROWS = 256, WIDTH = 8 };
    /* few channels: several rows are one, or vectors would be mostly empty */
    int64_t together = 1;
    while (channels * together < 8 * WIDTH && rows >= 64 * together) together *= 2;
    int64_t width = channels * together, wide = rows / together;
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
                    const float *restrict row = grad + r * width + c;
                    for (int j = 0; j < 8 * WIDTH; j++) lanes[j] += fabsf(row[j]);
                }
                for (int j = 0; j < 8 * WIDTH; j++) total[c + j] += lanes[j];
            }
            if (c < width) {
                for (int64_t j = c; j < width; j++) part[j] = 0;
                for (int64_t r = first; r < last; r++) {
                    const float *restrict row = grad + r * width;
                    for (int64_t j = c; j < width; j++) part[j] += fabsf(row[j]);
                }
                for (int64_t j = c; j < width; j++) total[j] += part[j];
            }
        }
    }
    for (int64_t r = wide * together; r < rows; r++)
        for (int64_t c = 0; c < channels; c++) totals[c] += fabsf(grad[r * channels + c]);
    for (int64_t c = 0; c < channels; c++) {
        double sum = 0;
        for (int64_t i = c; i < threads * width; i += channels) sum += totals[i];
        sums[c] = (float)sum;
    }
    free(totals), free(parts);
    return 0;
}

/* The same of (samples, channels, positions). */
TARGET static int NAME(abs_sum_first)(const float *grad, int64_t samples, int64_t channels, int64_t positions, float *sums,
                                      int threads)
{
    enum { LANES = 32, RUN_LENGTH = 8192 };
    double *totals = malloc((size_t)(samples * channels) * sizeof(double));
    if (!totals) return 1;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t plane = 0; plane < samples * channels; plane++) {
        const float *restrict values = grad + plane * positions;
        double total = 0;
        for (int64_t first = 0; first < positions; first += RUN_LENGTH) {
            int64_t last = first + RUN_LENGTH < positions ? first + RUN_LENGTH : positions, i = first;
            float lanes[LANES] = {0}, rest = 0;
            for (; i + LANES <= last; i += LANES)
                for (int j = 0; j < LANES; j++) lanes[j] += fabsf(values[i + j]);
            for (; i < last; i++) rest += fabsf(values[i]);
            for (int j = 0; j < LANES; j++) total += lanes[j];
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

/* Values of up to LANES channels side by side, from any layout: (positions, LANES). at holds each channel's offset. */
#define LANES 16

TARGET static inline void NAME(pick)(const float *restrict from, int64_t positions, int64_t step, const int64_t *restrict at,
                                     int lanes, float *restrict to)
{
    if (lanes == LANES)
        for (int64_t p = 0; p < positions; p++)
            for (int j = 0; j < LANES; j++) to[p * LANES + j] = from[p * step + at[j]];
    else
        for (int64_t p = 0; p < positions; p++)
            for (int j = 0; j < lanes; j++) to[p * LANES + j] = from[p * step + at[j]];
}

/* One tap of the kernel at count outputs of a row: its part of the weight's gradient, and of the input's if that is wanted. */
TARGET static inline void NAME(tap)(const float *restrict g, const float *restrict x, float *restrict dx,
                                    const float *restrict w, float *restrict dw, int64_t count, int64_t step)
{
    float sum[LANES] = {0};
    if (dx)
        for (int64_t o = 0; o < count; o++)
            for (int j = 0; j < LANES; j++) {
                sum[j] += g[o * LANES + j] * x[o * step * LANES + j];
                dx[o * step * LANES + j] += g[o * LANES + j] * w[j];
            }
    else
        for (int64_t o = 0; o < count; o++)
            for (int j = 0; j < LANES; j++) sum[j] += g[o * LANES + j] * x[o * step * LANES + j];
    for (int j = 0; j < LANES; j++) dw[j] += sum[j];
}

/* Gradients of a depthwise convolution from its kept channels.

   grad (samples, channels, out) and input (samples, channels, in), each with its own steps from a position and from a
   channel to the next; weight (channels, kernel), contiguous. input_grad, laid out as the input, may be null; weight_grad
   (channels, kernel) and bias_grad (channels) come as zeros. A task is a sample and LANES kept channels; it goes through its
   outputs in strips of rows whose data stays in the cache. */
TARGET static int NAME(depthwise)(const float *grad, const float *input, const float *weight, const int64_t *index,
                                  int64_t kept, int64_t samples, int64_t channels, const Geometry *geo, float *input_grad,
                                  float *weight_grad, float *bias_grad, int threads)
{
    const int64_t *in = geo->in, *out = geo->out, *k = geo->kernel, *s = geo->stride, *p = geo->padding, *d = geo->dilation;
    int64_t taps = k[0] * k[1] * k[2], blocks = (kept + LANES - 1) / LANES, width = blocks * LANES;
    int64_t in_plane = in[1] * in[2], in_all = in[0] * in_plane, out_all = out[0] * out[1] * out[2];
    int64_t reach = (k[1] - 1) * d[1] + 1;
    /* as many rows of outputs as have their part of grad, input and input_grad in 128 KiB, one at least */
    int64_t strip = (128 * 1024 / (int64_t)(sizeof(float) * LANES) - 2 * reach * in[2]) / (2 * s[1] * in[2] + out[2]);
    strip = strip < 1 ? 1 : strip > out[1] ? out[1] : strip;
    int64_t in_rows = (strip - 1) * s[1] + reach;
    in_rows = in_rows > in[1] ? in[1] : in_rows;
    size_t sums = (size_t)((taps + 1) * width), floats = sums + (size_t)(LANES * (2 * in_rows * in[2] + strip * out[2] + taps));
    float *memory = calloc((size_t)threads * floats, sizeof(float));
    if (!memory) return 1;
#pragma omp parallel num_threads(threads)
    {
        float *dw = memory + (size_t)omp_get_thread_num() * floats, *x = dw + sums, *dx = x + LANES * in_rows * in[2];
        float *g = dx + LANES * in_rows * in[2], *w = g + LANES * strip * out[2];
        if (input_grad) {
#pragma omp for schedule(static)
            for (int64_t plane = 0; plane < samples * channels; plane++)
                memset(input_grad + plane * in_all, 0, (size_t)in_all * sizeof(float));
        }
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < samples * blocks; task++) {
            int64_t n = task / blocks, block = task % blocks, at_grad[LANES] = {0}, at_input[LANES] = {0}, at_weight[LANES] = {0};
            int lanes = (int)(kept - block * LANES < LANES ? kept - block * LANES : LANES);
            for (int j = 0; j < lanes; j++) {
                at_grad[j] = index[block * LANES + j] * geo->grad_channel;
                at_input[j] = index[block * LANES + j] * geo->input_channel;
                at_weight[j] = index[block * LANES + j] * taps;
            }
            /* lanes beyond the last channel hold what an earlier task left there; nobody reads what comes of them */
            NAME(pick)(weight, taps, 1, at_weight, lanes, w);
            float *db = dw + taps * width + block * LANES;
            for (int64_t oz = 0; oz < out[0]; oz++)
                for (int64_t top = 0; top < out[1]; top += strip) {
                    int64_t bottom = top + strip < out[1] ? top + strip : out[1];
                    int64_t offset = n * channels * out_all + (oz * out[1] + top) * out[2] * geo->grad_position;
                    NAME(pick)(grad + offset, (bottom - top) * out[2], geo->grad_position, at_grad, lanes, g);
                    for (int64_t o = 0; o < (bottom - top) * out[2]; o++)
                        for (int j = 0; j < LANES; j++) db[j] += g[o * LANES + j];
                    /* rows of the input that the strip sees */
                    int64_t first = top * s[1] - p[1], last = (bottom - 1) * s[1] - p[1] + reach;
                    first = first < 0 ? 0 : first, last = last > in[1] ? in[1] : last;
                    for (int64_t a = 0; a < k[0] && first < last; a++) {
                        int64_t iz = oz * s[0] - p[0] + a * d[0], size = (last - first) * in[2];
                        if (iz < 0 || iz >= in[0]) continue;
                        offset = n * channels * in_all + (iz * in_plane + first * in[2]) * geo->input_position;
                        NAME(pick)(input + offset, size, geo->input_position, at_input, lanes, x);
                        if (input_grad) memset(dx, 0, (size_t)(LANES * size) * sizeof(float));
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
                                    NAME(tap)(g + ((oy - top) * out[2] + from) * LANES, x + place, input_grad ? dx + place : 0,
                                              w + tap * LANES, dw + tap * width + block * LANES, to - from, s[2]);
                                }
                            }
                        if (input_grad)
                            for (int64_t i = 0; i < size; i++)
                                for (int j = 0; j < lanes; j++)
                                    input_grad[offset + i * geo->input_position + at_input[j]] += dx[i * LANES + j];
                    }
                }
        }
    }
    for (int64_t tap = 0; tap <= taps; tap++)
        for (int64_t j = 0; j < kept; j++) {
            double sum = 0;
            for (int thread = 0; thread < threads; thread++) sum += memory[(size_t)thread * floats + (size_t)(tap * width + j)];
            *(tap < taps ? weight_grad + index[j] * taps + tap : bias_grad + index[j]) = (float)sum;
        }
    free(memory);
    return 0;
}

#undef LANES

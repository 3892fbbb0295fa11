/* The weight's gradient of a convolution of few input channels, for one kind of processor; see loops.h. Kept channels are LANES
   side by side, taps of all input channels are rows of a product over the positions of a row of outputs. */

/* A sample of the input, (inputs, in), with zeros before and after each row. */
TARGET static void NAME(pad)(const Layer *all, int64_t sample, float *padded)
{
    const Geometry *geo = all->geometry;
    int64_t rows = geo->in[0] * geo->in[1], in = geo->in[2], border = geo->padding[2], width = in + 2 * border;
    const float *own = all->input + sample * all->inputs * rows * in;
    for (int64_t c = 0; c < all->inputs; c++)
        for (int64_t row = 0; row < rows; row++) {
            const float *restrict from = own + c * geo->input_channel + row * in * geo->input_position;
            float *restrict to = padded + (c * rows + row) * width;
            for (int64_t i = 0; i < border; i++) to[i] = to[border + in + i] = 0;
            if (geo->input_position == 1)
                memcpy(to + border, from, (size_t)in * sizeof(float));
            else
                for (int64_t i = 0; i < in; i++) to[border + i] = from[i * geo->input_position];
        }
}

/* What a row of outputs adds to the sums of LANES kept channels: g (out[2], LANES), dw (kernel[0], kernel[1], rows, LANES). */
TARGET static void NAME(stem_row)(const Layer *all, int64_t oz, int64_t oy, const float *padded, const float *g, float *dw)
{
    const Geometry *geo = all->geometry;
    const int64_t *in = geo->in, *k = geo->kernel;
    int64_t width = in[2] + 2 * geo->padding[2], taps = all->inputs * k[2], rows = (taps + SIX - 1) / SIX * SIX;
    for (int64_t a = 0; a < k[0]; a++) {
        int64_t iz = oz * geo->stride[0] - geo->padding[0] + a * geo->dilation[0];
        if (iz < 0 || iz >= in[0]) continue;
        for (int64_t b = 0; b < k[1]; b++) {
            int64_t iy = oy * geo->stride[1] - geo->padding[1] + b * geo->dilation[1];
            if (iy < 0 || iy >= in[1]) continue;
            for (int64_t first = 0; first < rows; first += SIX) {
                const float *x[SIX];
                NAME(Vector) *own = (NAME(Vector) *)(dw + ((a * k[1] + b) * rows + first) * LANES), sums[SIX][2];
                for (int64_t i = 0; i < SIX; i++) {
                    int64_t tap = first + i < taps ? first + i : first;
                    x[i] = padded + ((tap / k[2] * in[0] + iz) * in[1] + iy) * width + tap % k[2] * geo->dilation[2];
                }
                NAME(product)(geo->out[2], x, geo->stride[2], g, LANES, sums);
                for (int i = 0; i < SIX; i++) own[2 * i] += sums[i][0], own[2 * i + 1] += sums[i][1];
            }
        }
    }
}

/* Gradients of weight and bias of an ungrouped convolution from its kept channels; see Layer for the arguments. */
TARGET static int NAME(stem)(const Layer *all, int threads)
{
    const Geometry *geo = all->geometry;
    const int64_t *in = geo->in, *out = geo->out, *k = geo->kernel;
    int64_t kept = all->kept, blocks = (kept + LANES - 1) / LANES, taps = all->inputs * k[2], rows = (taps + SIX - 1) / SIX * SIX;
    size_t block = lines((k[0] * k[1] * rows + 1) * LANES), sums = (size_t)blocks * block, row = lines(out[2] * LANES);
    size_t floats = sums + row + lines(all->inputs * in[0] * in[1] * (in[2] + 2 * geo->padding[2]));
    void *whole;
    float *memory = aligned((size_t)threads * floats, &whole);
    if (!whole) return 1;
    for (int thread = 0; thread < threads; thread++) memset(memory + (size_t)thread * floats, 0, (sums + row) * sizeof(float));
    /* a task is a sample; where there are too few of them, a part of its rows of outputs */
    int64_t lines_out = out[0] * out[1], parts = all->samples < 2 * threads && all->samples % threads ? threads : 1;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t task = 0; task < all->samples * parts; task++) {
        float *own = memory + (size_t)omp_get_thread_num() * floats, *g = own + sums, *padded = g + row;
        int64_t sample = task / parts, begin = lines_out * (task % parts) / parts, end = lines_out * (task % parts + 1) / parts;
        if (begin < end) NAME(pad)(all, sample, padded);
        for (int64_t o = begin; o < end; o++)
            for (int64_t first = 0; first < kept; first += LANES) {
                int lanes = (int)(kept - first < LANES ? kept - first : LANES);
                int64_t at[LANES] = {0};
                for (int j = 0; j < lanes; j++) at[j] = all->index[first + j] * geo->grad_channel;
                if (lanes < LANES) memset(g, 0, row * sizeof(float));
                const float *row_of_grad = all->grad + sample * geo->grad_sample + o * out[2] * geo->grad_position;
                NAME(pick)(row_of_grad, out[2], geo->grad_position, at, lanes, g);
                float *dw = own + (size_t)(first / LANES) * block, *db = dw + k[0] * k[1] * rows * LANES;
                NAME(Vector) low = {0}, high = {0};
                for (int64_t p = 0; p < out[2]; p++) low += ((NAME(Vector) *)g)[2 * p], high += ((NAME(Vector) *)g)[2 * p + 1];
                ((NAME(Vector) *)db)[0] += low, ((NAME(Vector) *)db)[1] += high;
                NAME(stem_row)(all, o / out[1], o % out[1], padded, g, dw);
            }
    }
    for (int64_t j = 0; j < kept; j++) {
        const float *own = memory + (size_t)(j / LANES) * block + j % LANES;
        for (int64_t tap = 0; tap <= all->inputs * all->taps; tap++) {
            int64_t c = tap / all->taps, rest = tap % all->taps; /* the last one is the bias */
            int64_t place = c < all->inputs ? rest / k[2] * rows + c * k[2] + rest % k[2] : k[0] * k[1] * rows;
            double sum = 0;
            for (int thread = 0; thread < threads; thread++) sum += own[(size_t)thread * floats + (size_t)(place * LANES)];
            float *weight = all->weight_grad, *bias = all->bias_grad;
            int64_t at = all->index[j] * all->inputs * all->taps + c * geo->weight_input + rest * geo->weight_tap;
            if (c < all->inputs && weight) weight[at] = (float)sum;
            if (c == all->inputs && bias) bias[all->index[j]] = (float)sum;
        }
    }
    free(whole);
    return 0;
}

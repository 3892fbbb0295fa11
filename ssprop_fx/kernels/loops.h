/* What the loops of kernels.c share, and the small ones, for one kind of processor: TARGET is a function's attribute, NAME adds
   the kind to a name, BYTES are those of a vector. */

typedef float NAME(Vector) __attribute__((vector_size(BYTES), aligned(sizeof(float))));

/* Channels that are computed side by side, in two vectors. */
#define LANES (2 * BYTES / (int)sizeof(float))

/* Sums of |grad| over the rows of (rows, channels), apart from each other, in single precision for a few hundred rows, then in
   double. */
TARGET static int NAME(abs_sum_last)(const float *grad, int64_t rows, int64_t apart, int64_t channels, float *sums, int threads)
{
    enum { ROWS = 256, WIDTH = 8 };
    int64_t together = apart == channels ? rows_together(channels, rows) : 1;
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

/* Sums over the rows of (rows, channels): of grad, and of grad · (input − mean) for each of the inputs, laid out as grad, and the
   means of its channels. Along memory, the sums in the nearest cache: in single precision for some rows, then in double. */
TARGET static int NAME(centered_sums)(const float *grad, const float *const *inputs, const float *const *means, int64_t number,
                                      int64_t rows, int64_t channels, float *sums, int threads)
{
    enum { ROWS = 64 };
    int64_t together = rows_together(channels, rows), width = channels * together, wide = rows / together;
    int64_t all = (1 + number) * width;
    size_t own = lines(all);
    void *whole;
    double *totals = calloc((size_t)threads * own, sizeof(double));
    float *memory = aligned(((size_t)threads + 1) * own, &whole), *centers = memory + (size_t)threads * own;
    if (!totals || !whole) {
        free(totals), free(whole);
        return 1;
    }
    for (int64_t i = 0; i < number; i++)
        for (int64_t c = 0; c < width; c++) centers[i * width + c] = means[i][c % channels];
#pragma omp parallel num_threads(threads)
    {
        int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
        double *restrict total = totals + (size_t)thread * own;
        float *restrict part = memory + (size_t)thread * own;
        int64_t begin = wide * thread / team, end = wide * (thread + 1) / team;
        for (int64_t first = begin; first < end; first += ROWS) {
            int64_t last = first + ROWS < end ? first + ROWS : end;
            memset(part, 0, (size_t)all * sizeof(float));
            for (int64_t r = first; r < last; r++) {
                const float *restrict row = grad + r * width;
                for (int64_t c = 0; c < width; c++) part[c] += row[c];
                for (int64_t i = 0; i < number; i++) {
                    const float *restrict input = inputs[i] + r * width, *restrict center = centers + i * width;
                    float *restrict to = part + (1 + i) * width;
                    for (int64_t c = 0; c < width; c++) to[c] += row[c] * (input[c] - center[c]);
                }
            }
            for (int64_t c = 0; c < all; c++) total[c] += part[c];
        }
    }
    for (int64_t at = wide * width; at < rows * channels; at++) {
        int64_t c = at % channels;
        totals[c] += grad[at];
        for (int64_t i = 0; i < number; i++) totals[(1 + i) * width + c] += grad[at] * (inputs[i][at] - means[i][c]);
    }
    for (int64_t i = 0; i <= number; i++)
        for (int64_t c = 0; c < channels; c++) {
            double sum = 0;
            for (int64_t thread = 0; thread < threads; thread++)
                for (int64_t j = c; j < width; j += channels) sum += totals[(size_t)thread * own + i * width + j];
            sums[i * channels + c] = (float)sum;
        }
    free(totals), free(whole);
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

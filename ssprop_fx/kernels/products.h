/* Backward passes as products of matrices over some positions at a time, which stay in the caches with what is kept of the
   gradient there; for one kind of processor, see loops.h.

   A column is a kept channel at one tap of the kernel. What a kept channel's gradient does to the input at a position, it does
   from as many places as the kernel has taps: a convolution of few kept channels is one of 1×1 from these columns, over the
   positions of the input. Of a strided one, each part of its input (see kernels.c) is such a convolution. */

/* sums[i] = Σ a[i][n · a_step] · b[n · b_step + lane], of SIX rows and LANES lanes: as many sums as keep the multipliers busy
   and the registers hold. */
TARGET static inline void NAME(product)(int64_t count, const float *const a[SIX], int64_t a_step, const float *b, int64_t b_step,
                                        NAME(Vector) sums[SIX][2])
{
    const float *first = a[0], *second = a[1], *third = a[2], *fourth = a[3], *fifth = a[4], *sixth = a[5];
    NAME(Vector) own[SIX][2] = {{{0}}};
    for (int64_t n = 0; n < count * a_step; n += a_step, b += b_step) {
        NAME(Vector) low = ((const NAME(Vector) *)b)[0], high = ((const NAME(Vector) *)b)[1];
        own[0][0] += first[n] * low, own[0][1] += first[n] * high;
        own[1][0] += second[n] * low, own[1][1] += second[n] * high;
        own[2][0] += third[n] * low, own[2][1] += third[n] * high;
        own[3][0] += fourth[n] * low, own[3][1] += fourth[n] * high;
        own[4][0] += fifth[n] * low, own[4][1] += fifth[n] * high;
        own[5][0] += sixth[n] * low, own[5][1] += sixth[n] * high;
    }
    for (int i = 0; i < SIX; i++) sums[i][0] = own[i][0], sums[i][1] = own[i][1];
}

/* sums[i][j] = Σ a[i · a_row + n] · b[j][n], of four rows and two; rows beyond the last one are read, and their sums unused. */
TARGET static inline void NAME(dots)(int64_t count, const float *restrict a, int64_t a_row, const float *const b[2],
                                     float sums[4][2])
{
    enum { WIDTH = BYTES / sizeof(float) };
    NAME(Vector) own[4][2] = {{{0}}};
    int64_t n = 0;
    for (; n + WIDTH <= count; n += WIDTH) {
        NAME(Vector) low = *(const NAME(Vector) *)(b[0] + n), high = *(const NAME(Vector) *)(b[1] + n);
        for (int i = 0; i < 4; i++) {
            NAME(Vector) value = *(const NAME(Vector) *)(a + i * a_row + n);
            own[i][0] += value * low, own[i][1] += value * high;
        }
    }
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 2; j++) {
            float sum = 0;
            for (int64_t rest = n; rest < count; rest++) sum += a[i * a_row + rest] * b[j][rest];
            for (int lane = 0; lane < WIDTH; lane++) sum += own[i][j][lane];
            sums[i][j] = sum;
        }
}

/* Up to LANES columns of some rows of sums to where they belong. */
TARGET static inline void NAME(store)(const NAME(Vector) sums[SIX][2], float *const to[SIX], int64_t rows, int64_t lanes)
{
    for (int64_t i = 0; i < rows; i++)
        if (lanes >= LANES)
            ((NAME(Vector) *)to[i])[0] = sums[i][0], ((NAME(Vector) *)to[i])[1] = sums[i][1];
        else
            memcpy(to[i], sums[i], (size_t)lanes * sizeof(float));
}

/* The columns at a run of positions, tap by tap those of all kept channels: position by position to_row apart and column by
   column to_column apart. Columns that lie side by side are copied as they are: all->grad then has the kept channels alone. */
TARGET static void NAME(columns)(const Layer *all, const Run *run, float *to, int64_t to_row, int64_t to_column)
{
    const Geometry *geo = all->geometry;
    const int64_t *out = geo->out, *k = geo->kernel, *p = geo->padding, *d = geo->dilation;
    int64_t step = geo->grad_position, column = 0;
    for (int64_t a = 0; a < k[0]; a++)
        for (int64_t b = 0; b < k[1]; b++)
            for (int64_t c = 0; c < k[2]; c++, column++) {
                /* the output that reads the run's first position at this tap */
                int64_t z = run->place[0] + p[0] - a * d[0], y = run->place[1] + p[1] - b * d[1];
                int64_t x = run->place[2] + p[2] - c * d[2];
                int none = z < 0 || z >= out[0] || y < 0 || y >= out[1];
                /* from the run's position first on, up to seen neighbouring outputs */
                int64_t output = x > 0 ? x : 0, first = output - x, seen = out[2] - output, most = run->count - first;
                seen = none || seen < 0 || most < 0 ? 0 : seen < most ? seen : most;
                int64_t row = geo->grad_sample * run->sample + ((z * out[1] + y) * out[2] + output) * step;
                float *own = to + column * all->kept * to_column;
                if (seen < run->count) /* somewhere no output reads */
                    for (int64_t j = 0; j < all->kept; j++)
                        for (int64_t i = 0; i < run->count; i++) own[i * to_row + j * to_column] = 0;
                if (to_column == 1) {
                    for (int64_t i = 0; i < seen; i++) {
                        const float *restrict from = all->grad + row + i * step;
                        float *restrict at = own + (first + i) * to_row;
                        for (int64_t j = 0; j < all->kept; j++) at[j] = from[j];
                    }
                    continue;
                }
                for (int64_t j = 0; seen && j < all->kept; j++, own += to_column) {
                    const float *restrict from = all->grad + row + all->index[j] * geo->grad_channel;
                    if (step == 1)
                        memcpy(own + first, from, (size_t)seen * sizeof(float));
                    else
                        for (int64_t i = 0; i < seen; i++) own[first + i] = from[i * step];
                }
            }
}

/* A strip of positions, channels last. g (count, step) of the columns; w and dw in panels of LANES input channels,
   (panels, columns, LANES) and (panels, rows of dw, LANES). What the next strip needs is fetched meanwhile: no processor sees by
   itself that it is in memory what comes next. */
TARGET static void NAME(strip_last)(const Layer *all, const Run *runs, int64_t count, const float *w, float *g, int64_t step,
                                    float *x, float *dw, int64_t dw_rows, float *db)
{
    const Geometry *geo = all->geometry;
    int64_t inputs = all->inputs, kept = all->kept * all->taps, at[ROWS_LAST];
    int64_t apart = all->apart[2], next = count * apart;
    int even = 1; /* the input's rows are equally far apart, and are read as they lie */
    for (const Run *run = runs; run->start < count; run++) {
        for (int64_t r = 0; r < run->count; r++) at[run->start + r] = run->input + r * apart;
        even = even && run->input - runs->input == run->start * apart;
        if (all->columns)
            NAME(columns)(all, run, g + run->start * step, step, 1);
        else if (geo->grad_channel == 1)
            for (int64_t r = 0; r < run->count; r++) {
                const float *restrict from = all->grad + run->grad + r * geo->grad_position;
                float *restrict to = g + (run->start + r) * step;
#pragma GCC unroll 8
                for (int64_t j = 0; j < kept; j++) to[j] = from[all->index[j]];
                for (int64_t c = all->index[0]; c <= all->index[kept - 1]; c += LINE)
                    __builtin_prefetch(from + count * geo->grad_position + c);
            }
        else
            for (int64_t j = 0; j < kept; j++) {
                const float *restrict from = all->grad + run->grad + all->index[j] * geo->grad_channel;
                float *restrict to = g + run->start * step + j;
                for (int64_t r = 0; r < run->count; r++) to[r * step] = from[r * geo->grad_position];
            }
    }
    for (int64_t first = 0; db && first < kept; first += 64) {
        float parts[64] = {0}; /* of the strip: a sum over all positions would lose what is small beside it */
        int64_t some = kept - first < 64 ? kept - first : 64;
        for (int64_t r = 0; r < count; r++)
            for (int64_t j = 0; j < some; j++) parts[j] += g[r * step + first + j];
        for (int64_t j = 0; j < some; j++) db[first + j] += parts[j];
    }
    NAME(Vector) sums[SIX][2];
    int64_t near = 8192 / (kept * LANES); /* panels whose weights stay in the nearest cache */
    near = near ? near * LANES : LANES;
    for (int64_t begin = 0; begin < inputs; begin += near) {
        int64_t end = begin + near < inputs ? begin + near : inputs;
        for (int64_t r = 0; all->input_grad && r < count; r += SIX) {
            int64_t rows = count - r < SIX ? count - r : SIX;
            for (int64_t c = begin; c < end; c += LANES) {
                const float *from[SIX];
                float *to[SIX];
                for (int64_t i = 0; i < SIX; i++) from[i] = g + (r + i) * step;
                for (int64_t i = 0; i < rows; i++) {
                    to[i] = all->input_grad + at[r + i] + c;
                    for (int lane = 0; lane < LANES; lane += LINE) __builtin_prefetch(to[i] + next + lane, 1);
                }
                NAME(product)(kept, from, 1, w + c * kept, LANES, sums);
                NAME(store)(sums, to, rows, inputs - c);
            }
        }
        for (int64_t c = begin; dw && c < end; c += LANES) {
            const float *from = all->input + at[0] + c;
            /* a share of them, in the order of memory, which takes less than row by row */
            for (int64_t i = 0; i < count * LANES; i += LINE) __builtin_prefetch(all->input + at[0] + next + c * count + i);
            if (!even || inputs - c < LANES) {
                int64_t lanes = inputs - c < LANES ? inputs - c : LANES;
                for (int64_t r = 0; r < count; r++)
                    for (int64_t lane = 0; lane < lanes; lane++) x[r * LANES + lane] = all->input[at[r] + c + lane];
                from = x;
            }
            for (int64_t j = 0; j < dw_rows; j += SIX) {
                const float *columns[SIX] = {g + j, g + j + 1, g + j + 2, g + j + 3, g + j + 4, g + j + 5};
                NAME(Vector) *own = (NAME(Vector) *)(dw + c * dw_rows + j * LANES);
                NAME(product)(count, columns, step, from, from == x ? LANES : apart, sums);
                for (int i = 0; i < SIX; i++) own[2 * i] += sums[i][0], own[2 * i + 1] += sums[i][1];
            }
        }
    }
}

/* The same with channels first. g (columns, step); w in panels of SIX input channels, (panels, columns, SIX); x (2, step)
   and dx (SIX, step) for what is no single run in memory; dw (columns, inputs). */
TARGET static void NAME(strip_first)(const Layer *all, const Run *runs, int64_t count, const float *w, float *g, int64_t step,
                                     float *x, float *dx, float *dw, float *db)
{
    const Geometry *geo = all->geometry;
    int64_t inputs = all->inputs, kept = all->kept * all->taps, apart = all->apart[2];
    const Run *end = runs;
    while (end->start + end->count < count) end++;
    /* one stretch of memory */
    int whole = apart == 1 && end->input - runs->input == end->start && end->sample == runs->sample;
    for (const Run *run = runs; all->columns && run->start < count; run++) NAME(columns)(all, run, g + run->start, 1, step);
    int64_t position = geo->grad_position, some = position == 1 ? count : LINE; /* of a row of channels each cache line once */
    for (const Run *run = runs; !all->columns && run->start < count; run++)
        for (int64_t first = 0; first < run->count; first += some)
            for (int64_t j = 0; j < kept; j++) {
                const float *restrict from = all->grad + run->grad + all->index[j] * geo->grad_channel + first * position;
                float *restrict to = g + j * step + run->start + first;
                int64_t rest = run->count - first, most = rest < some ? rest : some;
                if (position == 1) memcpy(to, from, (size_t)most * sizeof(float));
                for (int64_t p = 0; position != 1 && p < most; p++) to[p] = from[p * position];
            }
    for (int64_t j = 0; db && j < kept; j++) {
        enum { WIDTH = 16 };
        float lanes[WIDTH] = {0}, sum = 0;
        int64_t p = 0;
        for (; p + WIDTH <= count; p += WIDTH)
            for (int lane = 0; lane < WIDTH; lane++) lanes[lane] += g[j * step + p + lane];
        for (; p < count; p++) sum += g[j * step + p];
        for (int lane = 0; lane < WIDTH; lane++) sum += lanes[lane];
        db[j] += sum;
    }
    if (all->input_grad)
        for (int64_t c = 0; c < inputs; c += SIX) {
            int64_t rows = inputs - c < SIX ? inputs - c : SIX;
            for (int64_t p = 0; p < count; p += LANES) {
                NAME(Vector) sums[SIX][2];
                const float *from[SIX];
                float *to[SIX];
                for (int64_t i = 0; i < SIX; i++) from[i] = w + c * kept + i;
                for (int64_t i = 0; i < rows; i++)
                    to[i] = (whole ? all->input_grad + runs[0].input + (c + i) * geo->input_channel : dx + i * step) + p;
                NAME(product)(kept, from, SIX, g + p, step, sums);
                NAME(store)(sums, to, rows, count - p);
            }
            for (const Run *run = runs; !whole && run->start < count; run++)
                for (int64_t i = 0; i < rows; i++) {
                    float *restrict to = all->input_grad + run->input + (c + i) * geo->input_channel;
                    const float *restrict from = dx + i * step + run->start;
                    if (apart == 1) memcpy(to, from, (size_t)run->count * sizeof(float));
                    else
                        for (int64_t p = 0; p < run->count; p++) to[p * apart] = from[p];
                }
        }
    for (int64_t c = 0; dw && c < inputs; c += 2) {
        const float *b[2];
        for (int64_t i = 0; i < 2; i++) {
            int64_t offset = (c + i < inputs ? c + i : c) * geo->input_channel;
            b[i] = whole ? all->input + runs[0].input + offset : x + i * step;
            for (const Run *run = runs; !whole && run->start < count; run++) {
                const float *restrict from = all->input + run->input + offset;
                float *restrict to = x + i * step + run->start;
                if (apart == 1) memcpy(to, from, (size_t)run->count * sizeof(float));
                else
                    for (int64_t p = 0; p < run->count; p++) to[p] = from[p * apart];
            }
        }
        for (int64_t j = 0; j < kept; j += 4) {
            float sums[4][2];
            NAME(dots)(count, g + j * step, step, b, sums);
            for (int64_t i = 0; i < 4 && j + i < kept; i++)
                for (int64_t k = 0; k < 2 && c + k < inputs; k++) dw[(j + i) * inputs + c + k] += sums[i][k];
        }
    }
}

/* Where in the weight a column and an input channel meet. */
TARGET static inline int64_t NAME(place)(const Layer *all, int64_t column, int64_t c)
{
    const int64_t *k = all->geometry->kernel, *step = all->tap;
    int64_t output = all->index[column % all->kept], tap = column / all->kept;
    int64_t at = tap / (k[1] * k[2]) * step[0] + tap / k[2] % k[1] * step[1] + tap % k[2] * step[2];
    return output * all->weight_output + c * all->geometry->weight_input + at;
}

/* A sum of all threads, each floats after the one before, and of their earlier strips, if those stand apart. */
TARGET static inline double NAME(total)(const float *own, int64_t threads, size_t floats, size_t earlier)
{
    double sum = 0;
    for (int64_t thread = 0; thread < threads; thread++, own += floats) sum += (double)own[0] + (earlier ? own[earlier] : 0);
    return sum;
}

/* The bias's gradient of some kept channels. */
TARGET static void NAME(bias)(const Layer *all, const int64_t *index, int count)
{
    const Geometry *geo = all->geometry;
    int64_t outputs = geo->out[0] * geo->out[1] * geo->out[2], position = geo->grad_position, at[LANES];
    double sums[LANES] = {0};
    for (int j = 0; j < count; j++) at[j] = index[j] * geo->grad_channel;
    for (int64_t sample = 0; sample < all->samples; sample++) {
        const float *from = all->grad + sample * geo->grad_sample;
        if (geo->grad_channel < position) /* row by row of channels */
            for (int64_t p = 0; p < outputs; p++, from += position)
                for (int j = 0; j < count; j++) sums[j] += from[at[j]];
        else
            for (int j = 0; j < count; j++)
                for (int64_t p = 0; p < outputs; p++) sums[j] += from[at[j] + p * position];
    }
    for (int j = 0; j < count; j++) all->bias_grad[index[j]] = (float)sums[j];
}

/* What is done once for all parts: the bias's gradient, if asked for, and, where taken is given, the gradient's kept channels side
   by side, position by position. */
TARGET static void NAME(prepare)(const Layer *all, float *taken, int threads)
{
    const Geometry *geo = all->geometry;
    int64_t outputs = geo->out[0] * geo->out[1] * geo->out[2];
    /* some channels a task, so that there is one for every thread */
    int64_t each = (all->kept + threads - 1) / threads, some = each < LANES ? each : LANES;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static) nowait
        for (int64_t output = 0; output < (taken ? all->samples * outputs : 0); output++) {
            const float *restrict from = all->grad + output / outputs * geo->grad_sample + output % outputs * geo->grad_position;
            float *restrict to = taken + output * all->kept;
#pragma GCC unroll 8
            for (int64_t j = 0; j < all->kept; j++) to[j] = from[all->index[j] * geo->grad_channel];
        }
#pragma omp for schedule(static)
        for (int64_t first = 0; first < (all->bias_grad ? all->kept : 0); first += some)
            NAME(bias)(all, all->index + first, (int)(all->kept - first < some ? all->kept - first : some));
    }
}

/* Gradients of a convolution of one group, or of one of several, from its kept channels; see Layer for the arguments. */
TARGET static int NAME(products)(const Layer *all, int threads)
{
    const Geometry *geo = all->geometry;
    int last = geo->input_channel == 1;
    int64_t taps = all->taps, kept = all->kept * taps, inputs = all->inputs, most = last ? ROWS_LAST : ROWS_FIRST;
    const int64_t *grid = all->columns ? geo->in : geo->out;
    int64_t positions = grid[0] * grid[1] * grid[2];
    /* strips of equal length, enough for all threads: of one sample, if channels come first and it has positions enough */
    int64_t one = last || 2 * positions <= most ? all->samples * positions : positions, ones = all->samples * positions / one;
    int64_t strips = (one + most - 1) / most, fewest = (threads + ones - 1) / ones;
    int64_t length = (one + (strips > fewest ? strips : fewest) - 1) / (strips > fewest ? strips : fewest);
    if (!last && one > positions) length = length < positions ? positions : length / positions * positions;
    strips = (one + length - 1) / length;

    int64_t dw_rows = (kept + SIX - 1) / SIX * SIX, width = last ? LANES : SIX, panels = (inputs + width - 1) / width;
    int64_t step = last ? dw_rows % 32 ? dw_rows : dw_rows + SIX : most + LANES;
    /* a thread's sums for the weight and for the bias, those of its earlier strips, its strip of grad and of what is copied; all
       begin with a cache line */
    size_t weight_sums = lines(last ? panels * dw_rows * LANES : kept * inputs), sums = weight_sums + lines(kept);
    size_t earlier = ones * strips > FOLDED * threads ? sums : 0, strip = lines((last ? most + SIX : dw_rows + 2) * step);
    size_t floats = sums + earlier + strip + lines(last ? most * LANES : (2 + SIX) * step);
    size_t weights = lines(panels * width * kept);
    void *whole;
    float *memory = aligned((size_t)threads * floats + weights, &whole), *w = memory + (size_t)threads * floats;
    if (!whole) return 1;
#pragma omp parallel num_threads(threads)
    {
        int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
        float *dw = memory + (size_t)thread * floats, *db = dw + weight_sums, *g = dw + sums + earlier, *x = g + strip;
        memset(dw, 0, floats * sizeof(float));
        for (int64_t other = team; !thread && other < threads; other++) /* fewer than were asked for */
            memset(memory + (size_t)other * floats, 0, (sums + earlier) * sizeof(float));
#pragma omp for schedule(static)
        for (int64_t panel = 0; panel < (all->input_grad ? panels : 0); panel++)
            for (int64_t j = 0; j < kept; j++) {
                int64_t lanes = inputs - panel * width < width ? inputs - panel * width : width;
                const float *from = all->weight + NAME(place)(all, j, panel * width);
                float *to = w + (panel * kept + j) * width;
                for (int64_t c = 0; c < width; c++) to[c] = c < lanes ? from[c * geo->weight_input] : 0;
            }
        Run runs[ROWS_FIRST + 1];
        int64_t done = 0;
#pragma omp for schedule(static)
        for (int64_t task = 0; task < ones * strips; task++) {
            int64_t begin = task / strips * one + task % strips * length, end = task / strips * one + one;
            int64_t count = end - begin < length ? end - begin : length;
            find_runs(all, begin, count, runs);
            float *own = all->weight_grad ? dw : 0, *bias = all->bias_grad ? db : 0;
            if (last)
                NAME(strip_last)(all, runs, count, w, g, step, x, own, dw_rows, bias);
            else
                NAME(strip_first)(all, runs, count, w, g, step, x, x + 2 * step, own, bias);
            if (earlier && ++done % FOLDED == 0) /* or a long sum would lose what is small beside it */
                for (size_t i = 0; i < sums; i++) dw[i + sums] += dw[i], dw[i] = 0;
        }
#pragma omp for schedule(static)
        for (int64_t j = 0; j < kept; j++) {
            for (int64_t c = 0; all->weight_grad && c < inputs; c += LANES) {
                const float *own = memory + (last ? c * dw_rows + j * LANES : j * inputs + c);
                float *to = all->weight_grad + NAME(place)(all, j, c);
                for (int64_t lane = 0; lane < LANES && c + lane < inputs; lane++)
                    to[lane * geo->weight_input] = (float)NAME(total)(own + lane, threads, floats, earlier);
            }
            if (!all->bias_grad) continue;
            all->bias_grad[all->index[j]] = (float)NAME(total)(memory + weight_sums + j, threads, floats, earlier);
        }
    }
    free(whole);
    return 0;
}

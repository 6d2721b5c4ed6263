// Stable sort along one dimension, and its first elements.
//
//   values[p, j] = x[p, indices[p, j]], j < keep, in ascending or descending order; equal elements in the order they had.
//   NaN counts as larger than everything and equal to itself, as in torch.
//
//   x (P, N), P = outer x inner; values, indices (P, keep): strides x_outer, x_inner (P = outer * n_inner + inner), x_dim, ...
//   sort_rows merges: positions in runs of RUN, sorted by insertion, then of twice that size and so on, between two
//   buffers of N positions a group. select_rows keeps the best `keep` positions seen so far in order: keep N at worst, but
//   on random data few elements get that far.
//
// Work-group: one work-item; it does rows_per_group rows. positions: 2 N ints a group for sort_rows, keep for select_rows.
// Build constants: T, the type of x; DESCENDING, 0 or 1.
// Tolerance: exact.
// Source: Knuth, "The Art of Computer Programming" 3, 2nd ed., 5.2.4, algorithm S without its search for natural runs.

#define RUN 8

#define ROW(x, p) (x##_buffer + x##_offset + (size_t)((p) / n_inner) * x##_outer + (size_t)((p) % n_inner) * x##_inner)
#define AT(i) x[(size_t)(i) * x_dim]

#if DESCENDING
#define BEFORE(a, b) ((a) > (b) || ((a) != (a) && (b) == (b)))
#else
#define BEFORE(a, b) ((a) < (b) || ((b) != (b) && (a) == (a)))
#endif

#define PARAMETERS                                                                                                        \
    __global const T *x_buffer, const int x_offset, __global T *values_buffer, const int values_offset,                   \
        __global long *indices_buffer, const int indices_offset, __global int *positions_buffer,                          \
        const int positions_offset, const int P, const int N, const int keep, const int n_inner,                          \
        const int rows_per_group, const int x_outer, const int x_dim, const int x_inner, const int values_outer,          \
        const int values_dim, const int values_inner, const int indices_outer, const int indices_dim,                     \
        const int indices_inner

// Insert `position` into the sorted list of n positions, behind those that are equal.
static inline void insert(__global const T *x, const int x_dim, __global int *list, const int n, const int position)
{
    const T value = AT(position);
    int j = n;
    for (; j > 0 && BEFORE(value, AT(list[j - 1])); j--) list[j] = list[j - 1];
    list[j] = position;
}

// Write the elements at `keep` positions.
#define WRITE(p, list)                                                                                                    \
    for (int j = 0; j < keep; j++) {                                                                                      \
        ROW(values, p)[(size_t)j * values_dim] = AT((list)[j]);                                                           \
        ROW(indices, p)[(size_t)j * indices_dim] = (list)[j];                                                             \
    }

KERNEL sort_rows(PARAMETERS)
{
    __global int *from = positions_buffer + positions_offset + (size_t)get_group_id(0) * 2 * N, *to = from + N;
    FOR_ROWS(p, P, rows_per_group) {
        __global const T *x = ROW(x, p);
        for (int start = 0; start < N; start += RUN)
            for (int i = start; i < N && i < start + RUN; i++) insert(x, x_dim, from + start, i - start, i);
        for (int width = RUN; width < N; width = N - width < width ? N : 2 * width) {
            for (int start = 0; start < N;) {
                const int middle = N - start < width ? N : start + width, end = N - middle < width ? N : middle + width;
                int a = start, b = middle;
                for (int i = start; i < end; i++) {
                    const int is_right = a == middle || (b < end && BEFORE(AT(from[b]), AT(from[a])));
                    to[i] = is_right ? from[b++] : from[a++];
                }
                start = end;
            }
            __global int *sorted = to;
            to = from, from = sorted;
        }
        WRITE(p, from)
    }
}

KERNEL select_rows(PARAMETERS)
{
    __global int *list = positions_buffer + positions_offset + (size_t)get_group_id(0) * keep;
    FOR_ROWS(p, P, rows_per_group) {
        __global const T *x = ROW(x, p);
        for (int i = 0; i < keep; i++) insert(x, x_dim, list, i, i);
        T last = AT(list[keep - 1]);
        for (int i = keep; i < N; i++) {
            if (!BEFORE(AT(i), last)) continue;
            insert(x, x_dim, list, keep - 1, i);
            last = AT(list[keep - 1]);
        }
        WRITE(p, list)
    }
}

// Sum, maximum or minimum along one dimension.
//
//   reduce_rows:     out[p, chunk] = scale * reduce over c of x[p, c]           x (P, C), P = outer x inner
//   reduce_columns:  out[p, chunk, q] = scale * reduce over r of x[p, r, q]     x (P, R, Q)
//
//   A group reduces chunk_size of the C (or R) elements; with more than one chunk, `out` is a scratch of partial results
//   that a second launch reduces. Strides x_outer, x_inner (P = outer * n_inner + inner), x_col, ...: any.
//   out: p * out_p + chunk * out_chunk + q * out_col.
//
// Work-group: one work-item. reduce_rows: (ceil(P / rows_per_group), chunks) groups;
// reduce_columns: (ceil(Q / BLOCK), chunks, P) groups.
// Build constants: LANES (common.cl); KIND: 0 sum, 1 maximum, 2 minimum.
// Maximum and minimum give NaN if one element is NaN, as torch. The order depends on the shape alone.
// Tolerance: n / LANES eps of the sum of |x| at worst for n elements of a chunk; maximum and minimum are exact.
// Source: the definition.

#ifndef KIND
#define KIND 0
#endif
#if KIND == 0
#define START 0.0f
#define COMBINE(a, b) ((a) + (b))
#define ACROSS(v) sum_lanes(v)
#elif KIND == 1
#define START (-INFINITY)
#define COMBINE(a, b) maximum(a, b)
#define ACROSS(v) max_lanes(v)
#else
#define START INFINITY
#define COMBINE(a, b) minimum(a, b)
#define ACROSS(v) min_lanes(v)
#endif
#define BLOCK 64
#define VECTORS (BLOCK / LANES)

KERNEL reduce_rows(TENSOR(x), TENSOR_OUT(out), const int P, const int C, const int n_inner, const int rows_per_group,
                   const int chunk_size, const int x_outer, const int x_inner, const int x_col, const int out_p,
                   const int out_chunk, const float scale)
{
    const int c0 = get_group_id(1) * chunk_size;
    const int c1 = C - c0 < chunk_size ? C : c0 + chunk_size;
    FOR_ROWS(p, P, rows_per_group) {
        __global const float *x = BASE(x) + (size_t)(p / n_inner) * x_outer + (size_t)(p % n_inner) * x_inner;
        __global const float *end = x + (size_t)(C - 1) * x_col + 1;
        vec v0 = START, v1 = START;
        int c = c0;
        for (; c + 2 * LANES <= c1; c += 2 * LANES) {
            v0 = COMBINE(v0, load_row(x + (size_t)c * x_col, x, x_col, LANES, START));
            v1 = COMBINE(v1, load_row(x + (size_t)(c + LANES) * x_col, x, x_col, LANES, START));
        }
        for (; c < c1; c += LANES) v0 = COMBINE(v0, load_row(x + (size_t)c * x_col, end, x_col, c1 - c, START));
        BASE(out)[(size_t)p * out_p + get_group_id(1) * out_chunk] = ACROSS(COMBINE(v0, v1)) * scale;
    }
}

KERNEL reduce_columns(TENSOR(x), TENSOR_OUT(out), const int R, const int Q, const int n_inner, const int chunk_size,
                      const int x_outer, const int x_inner, const int x_row, const int x_col, const int out_p,
                      const int out_chunk, const int out_col, const float scale)
{
    const int q0 = get_group_id(0) * BLOCK, p = get_group_id(2);
    const int r0 = get_group_id(1) * chunk_size;
    const int r1 = R - r0 < chunk_size ? R : r0 + chunk_size;
    __global const float *x = BASE(x) + (size_t)(p / n_inner) * x_outer + (size_t)(p % n_inner) * x_inner + (size_t)q0 * x_col;
    __global float *out = BASE(out) + (size_t)p * out_p + get_group_id(1) * out_chunk + (size_t)q0 * out_col;
    vec sum[VECTORS];
    #pragma unroll
    for (int v = 0; v < VECTORS; v++) sum[v] = START;
    if (x_col == 1 && Q - q0 >= BLOCK) {
        for (int r = r0; r < r1; r++)
            #pragma unroll
            for (int v = 0; v < VECTORS; v++) sum[v] = COMBINE(sum[v], LOAD(x + (size_t)r * x_row + v * LANES));
    } else {
        __global const float *end = x + (size_t)(R - 1) * x_row + (size_t)(Q - q0 - 1) * x_col + 1;
        for (int r = r0; r < r1; r++)
            #pragma unroll
            for (int v = 0; v < VECTORS; v++) {
                const int left = Q - q0 - v * LANES;
                if (left > 0)
                    sum[v] = COMBINE(sum[v], load_row(x + (size_t)r * x_row + (size_t)v * LANES * x_col, end, x_col, left,
                                                      START));
            }
    }
    #pragma unroll
    for (int v = 0; v < VECTORS; v++) {
        const int left = Q - q0 - v * LANES;
        if (left > 0) store_row(out + (size_t)v * LANES * out_col, out_col, left, sum[v] * scale);
    }
}

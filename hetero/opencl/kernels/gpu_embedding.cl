// Rows of a table, and the gradient of the table, on GPU-type devices; formulas: embedding.cl.
//
//   weight, dweight (V, D), out, grad (R, D): strides weight_row, weight_col, ... any. indices (R) int64: one stride.
//   An index outside [0, V) gives a row of NaN; in the gradient it is left out.
//
// Work-group: GROUP_X work-items, GROUP_Y is 1. embedding: a work-item an element; (R, ceil(D / GROUP_X)) groups.
// embedding_backward: GROUP_X columns of table_rows rows of the table; (ceil(D / GROUP_X), ceil(V / table_rows)) groups. A
// group looks through all indices, GROUP_X at a time; every element belongs to one work-item, which adds in the order of r.
// Tolerance: forward exact; backward n eps of the sum of |grad| over the n rows of one index.
// Source: the definition.

KERNEL embedding(TENSOR(weight), TENSOR_INT64(indices), TENSOR_OUT(out), const int R, const int V, const int D,
                 const int weight_row, const int weight_col, const int index_stride, const int out_row, const int out_col)
{
    const int r = get_group_id(0), c = get_group_id(1) * GROUP_X + X;
    if (c >= D) return;
    const long v = BASE(indices)[(size_t)r * index_stride];
    float t = NAN;
    if (v >= 0 && v < V) t = BASE(weight)[(size_t)v * weight_row + (size_t)c * weight_col];
    BASE(out)[(size_t)r * out_row + (size_t)c * out_col] = t;
}

KERNEL embedding_backward(TENSOR(grad), TENSOR_INT64(indices), TENSOR_OUT(dweight), const int R, const int V, const int D,
                          const int table_rows, const int padding_idx, const int grad_row, const int grad_col,
                          const int index_stride, const int dweight_row, const int dweight_col)
{
    __local int rows[GROUP_X];  // of the table, from the group's first one; -1: not the group's
    const int c = get_global_id(0), v0 = get_group_id(1) * table_rows;
    const int n = V - v0 < table_rows ? V - v0 : table_rows;
    __global float *dweight = BASE(dweight) + (size_t)v0 * dweight_row + (size_t)c * dweight_col;
    if (c < D)
        for (int i = 0; i < n; i++) dweight[(size_t)i * dweight_row] = 0.0f;
    for (int r0 = 0; r0 < R; r0 += GROUP_X) {
        int row = -1;
        if (r0 + X < R) {
            const long v = BASE(indices)[(size_t)(r0 + X) * index_stride];
            if (v != padding_idx && v >= v0 && v < v0 + n) row = (int)(v - v0);
        }
        rows[X] = row;
        BARRIER;
        const int seen = R - r0 < GROUP_X ? R - r0 : GROUP_X;
        if (c < D)
            for (int i = 0; i < seen; i++)
                if (rows[i] >= 0)
                    dweight[(size_t)rows[i] * dweight_row] += BASE(grad)[(size_t)(r0 + i) * grad_row + (size_t)c * grad_col];
        BARRIER;
    }
}

// out = a @ b for every matrix of a batch, in types that gemm.cl is not for: float64 and integers.
//
//   a (B, M, K), b (B, K, N), out (B, M, N): strides in elements, any (x_batch, x_row, x_col). K may be 0.
//
// Work-group: one work-item; it does rows_per_group of the B M rows.
// Build constants: T, the type; integers as unsigned ones, whose sums are those of the signed ones modulo 2^n. W: what it is
// computed in, T or uint where T is narrower.
// Order of a sum: k ascending. Tolerance: |error| <= K eps (|a| @ |b|); integers exact.
// Source: the definition.

KERNEL product(__global const T *a_buffer, const int a_offset, __global const T *b_buffer, const int b_offset,
               __global T *out_buffer, const int out_offset, const int B, const int M, const int N, const int K,
               const int rows_per_group, const int a_batch, const int a_row, const int a_col, const int b_batch,
               const int b_row, const int b_col, const int out_batch, const int out_row, const int out_col)
{
    FOR_ROWS(r, B * M, rows_per_group) {
        __global const T *a = BASE(a) + (size_t)(r / M) * a_batch + (size_t)(r % M) * a_row;
        __global const T *b = BASE(b) + (size_t)(r / M) * b_batch;
        __global T *out = BASE(out) + (size_t)(r / M) * out_batch + (size_t)(r % M) * out_row;
        for (int j = 0; j < N; j++) out[(size_t)j * out_col] = 0;
        for (int k = 0; k < K; k++) {
            const W t = a[(size_t)k * a_col];
            __global const T *row = b + (size_t)k * b_row;
            for (int j = 0; j < N; j++) out[(size_t)j * out_col] = (T)(out[(size_t)j * out_col] + t * row[(size_t)j * b_col]);
        }
    }
}

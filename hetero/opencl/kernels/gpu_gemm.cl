// out = a @ b [+ bias] [+ residual], for every matrix of a batch, on GPU-type devices.
//
//   a (B, M, K), b (B, K, N), out (B, M, N), residual (B, M, N): strides in elements, any (x_batch, x_row, x_col).
//   bias (N): stride bias_col. residual may be out itself.
//   gemm: out[split] is the sum over k in [split * k_share, (split + 1) * k_share). With one split that is all of K, and
//   bias and residual are added; with more, out is a scratch (splits, B, M, N), and gemm_combine adds its parts in order.
//
// Work-group: GROUP_X x GROUP_Y work-items compute a tile of TILE_M x TILE_N; work-item (X, Y) the rows Y + i GROUP_Y and the
// columns X + j GROUP_X, so that neighbours store neighbours. gemm: (B * splits * ceil(N / TILE_N), ceil(M / TILE_M))
// groups; gemm_combine: (B * ceil(N / GROUP_X), ceil(M / GROUP_Y)) groups, a work-item an element. (Drivers may take no more
// than 65535 groups in any dimension but the first.)
// Build constants: TILE_M, TILE_N, multiples of GROUP_Y and GROUP_X; TILE_K; REAL: what the tensors hold, float or half;
// OUT_REAL: what out holds; USES_HALF: whether that is half somewhere. The arithmetic is float's.
// Local memory: TILE_K (TILE_M + TILE_N + 2) floats. The extra column spreads what is stored transposed over the banks.
// Order of a sum: k ascending within a split, then the splits; the tile doesn't matter.
// Tolerance: |error| <= K eps (|a| @ |b|), tests/kernel_harness.py.
// Source: the blocking of Volkov, Demmel, "Benchmarking GPUs to tune dense linear algebra", SC 2008; splitting K: Osama et
// al., "Stream-K", PPoPP 2023, section 2.

#ifndef REAL
#define REAL float
#endif
#ifndef OUT_REAL
#define OUT_REAL REAL
#endif
#if USES_HALF
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#endif
#define MATRIX(x) __global const REAL *x##_buffer, const int x##_offset
#define MATRIX_OUT(x, type) __global type *x##_buffer, const int x##_offset

#ifdef TILE_M
#define ROWS (TILE_M / GROUP_Y)
#define COLS (TILE_N / GROUP_X)

// A tile (depth, size) of a or b: tile[k][m] = source[m, k], 0 where either index is past its limit. Work-items go along
// whatever lies side by side in memory.
#define FETCH(tile, size, source, step, k_step, limit, k_limit)                                          \
    for (int i = ITEM; i < (size) * TILE_K; i += GROUP_ITEMS) {                                          \
        const int along_k = (k_step) == 1;                                                               \
        const int m = along_k ? i / TILE_K : i % (size), k = along_k ? i % TILE_K : i / (size);           \
        tile[k * ((size) + 1) + m] =                                                                     \
            m < (limit) && k < (k_limit) ? (float)(source)[(size_t)m * (step) + (size_t)k * (k_step)] : 0.0f; \
    }

KERNEL gemm(MATRIX(a), MATRIX(b), MATRIX(bias), MATRIX(residual), MATRIX_OUT(out, OUT_REAL), const int M, const int N,
            const int K, const int splits, const int k_share, const int a_batch, const int a_row, const int a_col,
            const int b_batch, const int b_row, const int b_col, const int out_split, const int out_batch,
            const int out_row, const int out_col, const int has_bias, const int bias_col, const int has_residual,
            const int residual_batch, const int residual_row, const int residual_col)
{
    __local float a_tile[TILE_K * (TILE_M + 1)], b_tile[TILE_K * (TILE_N + 1)];
    const int n_tiles = (N + TILE_N - 1) / TILE_N, part = get_group_id(0) / n_tiles;
    const size_t batch = part / splits, split = part % splits;
    const int row0 = get_group_id(1) * TILE_M, col0 = get_group_id(0) % n_tiles * TILE_N;
    const int first = split * k_share, last = K - first < k_share ? K : first + k_share;
    __global const REAL *a = BASE(a) + batch * a_batch + (size_t)row0 * a_row;
    __global const REAL *b = BASE(b) + batch * b_batch + (size_t)col0 * b_col;

    float sum[ROWS][COLS];
    #pragma unroll
    for (int i = 0; i < ROWS; i++)
        #pragma unroll
        for (int j = 0; j < COLS; j++) sum[i][j] = 0.0f;

    for (int k0 = first; k0 < last; k0 += TILE_K) {
        FETCH(a_tile, TILE_M, a + (size_t)k0 * a_col, a_row, a_col, M - row0, last - k0)
        FETCH(b_tile, TILE_N, b + (size_t)k0 * b_row, b_col, b_row, N - col0, last - k0)
        BARRIER;
        for (int k = 0; k < TILE_K; k++) {
            float x[ROWS], y[COLS];
            #pragma unroll
            for (int i = 0; i < ROWS; i++) x[i] = a_tile[k * (TILE_M + 1) + Y + i * GROUP_Y];
            #pragma unroll
            for (int j = 0; j < COLS; j++) y[j] = b_tile[k * (TILE_N + 1) + X + j * GROUP_X];
            #pragma unroll
            for (int i = 0; i < ROWS; i++)
                #pragma unroll
                for (int j = 0; j < COLS; j++) sum[i][j] += x[i] * y[j];
        }
        BARRIER;
    }

    #pragma unroll
    for (int i = 0; i < ROWS; i++)
        #pragma unroll
        for (int j = 0; j < COLS; j++) {
            const size_t row = row0 + Y + i * GROUP_Y, col = col0 + X + j * GROUP_X;
            if (row >= (size_t)M || col >= (size_t)N) continue;
            float t = sum[i][j];
            if (has_bias) t += (float)BASE(bias)[col * bias_col];
            if (has_residual) t += (float)BASE(residual)[batch * residual_batch + row * residual_row + col * residual_col];
            BASE(out)[split * out_split + batch * out_batch + row * out_row + col * out_col] = (OUT_REAL)t;
        }
}
#endif

KERNEL gemm_combine(MATRIX_OUT(partial, const float), MATRIX(bias), MATRIX(residual), MATRIX_OUT(out, REAL), const int M,
                    const int N, const int splits, const int partial_split, const int out_batch, const int out_row,
                    const int out_col, const int has_bias, const int bias_col, const int has_residual,
                    const int residual_batch, const int residual_row, const int residual_col)
{
    const int n_tiles = (N + GROUP_X - 1) / GROUP_X;
    const size_t batch = get_group_id(0) / n_tiles, row = get_global_id(1), col = get_group_id(0) % n_tiles * GROUP_X + X;
    if (row >= (size_t)M || col >= (size_t)N) return;
    __global const float *part = BASE(partial) + (batch * M + row) * N + col;
    float t = 0.0f;
    for (int split = 0; split < splits; split++) t += part[(size_t)split * partial_split];
    if (has_bias) t += (float)BASE(bias)[col * bias_col];
    if (has_residual) t += (float)BASE(residual)[batch * residual_batch + row * residual_row + col * residual_col];
    BASE(out)[batch * out_batch + row * out_row + col * out_col] = (REAL)t;
}

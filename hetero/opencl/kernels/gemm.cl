// out = a @ b [+ bias] [+ residual], for every matrix of a batch.
//
//   a (B, M, K), b (B, K, N), out (B, M, N), residual (B, M, N): strides in elements, any (x_batch, x_row, x_col).
//   bias (N): stride bias_col.
//
// A register tile of MR x NR products reads MR rows of a and a panel of b: (K, NR), zeros after column N.
// Panels: if IS_PACKED, gemm_pack_b has written them, COLUMN_UNIT / NR of them a group, and gemm gets them as its b:
// the panel of column j begins at j * K. Else each group of gemm makes its own in local memory, KC rows at a time.
// a: if HAS_ROWS its rows are contiguous (a_col = 1) and are read where they lie; else a block of it is copied to local
// memory as panels of (KC, MR), which stay in the second-level cache while the group goes through its columns.
//
// Work-group: one work-item. gemm: (ceil(M / block_rows), ceil(N / block_cols), B) groups, each one block of out;
// block_rows a multiple of MR, at most BLOCK_ROWS unless HAS_ROWS; block_cols a multiple of COLUMN_UNIT.
// gemm_pack_b: (ceil(N / COLUMN_UNIT), B) groups.
// Build constants: LANES (common.cl); HAS_ROWS, IS_PACKED; KC >= depth, BLOCK_ROWS: sizes of local arrays. Of 16
// registers of 8 lanes 12 are accumulators, of 32 of 16 lanes 24.
// Residual and bias are added with the first `depth` products, later ones accumulate in out: residual may be out itself.
// Epilogue: where generated code defines EPILOGUE_PARAMETERS, its `epilogue` is called on EPILOGUE_COLUMNS of a block at a
// time, when they are finished and not yet out of the second-level cache. Its rows are those of all matrices, batch * M on.
// Order of a sum: k ascending in chunks of depth. depth depends on K and HAS_ROWS alone, neither on blocks nor on
// cores.
// Tolerance: |error| <= K eps (|a| @ |b|), tests/kernel_harness.py.
// Source: Van Zee, van de Geijn, "BLIS: a framework for rapidly instantiating BLAS functionality", ACM TOMS 41(3) 2015.

#ifndef KC
#define KC 384
#define BLOCK_ROWS 384
#define HAS_ROWS 1
#define IS_PACKED 0
#endif
#if LANES == 16
#define MR 12
#else
#define MR 6
#endif
#define NR (2 * LANES)
#define EPILOGUE_COLUMNS 256
#ifdef EPILOGUE_PARAMETERS
#define HAS_EPILOGUE 1
#else
#define HAS_EPILOGUE 0
#define EPILOGUE_PARAMETERS
#endif
#define COLUMN_UNIT 32

#if IS_PACKED
#define PANEL __global
#define LOAD_PANEL LOAD
#define STORE_PANEL STORE
#else
#define PANEL __local
#define LOAD_PANEL LOAD_LOCAL
#define STORE_PANEL STORE_LOCAL
#endif

// LANES columns of a b that lies transposed (b_row = 1), LANES x LANES elements at a time.
static inline void pack_transposed(__global const float *s, const int b_col, PANEL float *target, const int K)
{
    int k = 0;
    for (; k + LANES <= K; k += LANES) {
        vec tile[LANES];
        #pragma unroll
        for (int i = 0; i < LANES; i++) tile[i] = LOAD(s + (size_t)i * b_col + k);
        transpose(tile);
        #pragma unroll
        for (int i = 0; i < LANES; i++) STORE_PANEL(target + (size_t)(k + i) * NR, tile[i]);
    }
    for (; k < K; k++)
        for (int i = 0; i < LANES; i++) target[(size_t)k * NR + i] = s[(size_t)i * b_col + k];
}

// One panel of n <= NR columns.
static inline void pack_panel(__global const float *b, const int b_row, const int b_col, PANEL float *target, const int K,
                              const int n)
{
    if (n >= NR && b_col == 1) {
        for (int k = 0; k < K; k++, b += b_row, target += NR)
            for (int v = 0; v < NR; v += LANES) STORE_PANEL(target + v, LOAD(b + v));
    } else if (n >= NR && b_row == 1) {
        pack_transposed(b, b_col, target, K);
        pack_transposed(b + (size_t)LANES * b_col, b_col, target + LANES, K);
    } else {
        for (int k = 0; k < K; k++, target += NR)
            for (int i = 0; i < NR; i++) target[i] = i < n ? b[(size_t)k * b_row + (size_t)i * b_col] : 0.0f;
    }
}

#if IS_PACKED
KERNEL gemm_pack_b(TENSOR(b), TENSOR_OUT(packed), const int K, const int N, const int b_batch, const int b_row,
                   const int b_col)
{
    const size_t unit = get_group_id(0), batch = get_group_id(1);
    __global float *target = BASE(packed) + (batch * get_num_groups(0) + unit) * K * COLUMN_UNIT;
    for (int j = unit * COLUMN_UNIT; j < (int)(unit + 1) * COLUMN_UNIT; j += NR, target += (size_t)K * NR)
        pack_panel(BASE(b) + batch * b_batch + (size_t)j * b_col, b_row, b_col, target, K, N - j);
}
#endif

#if !HAS_ROWS
// Panels of a block of a: MR rows each, (kc, MR), one behind the other. Rows that don't exist stay as they are: their
// products are never stored.
static inline void pack_a(__global const float *a, const int a_row, const int a_col, __local float *packed,
                          const int rows, const int kc)
{
    // LANES > MR: what is written too much is overwritten by the next k; so the last k goes one by one. CHUNK rows of a
    // at a time, so that lines read for one panel are still there for the next.
    enum { CHUNK = 4 };
    const int whole = a_row == 1 && a_col >= LANES ? rows / MR * MR : 0, last = kc > 0 ? kc - 1 : 0;
    for (int k0 = 0; k0 < last; k0 += CHUNK) {
        const int k1 = last - k0 < CHUNK ? last : k0 + CHUNK;
        for (int i = 0; i < whole; i += MR) {
            __global const float *s = a + (size_t)k0 * a_col + i;
            __local float *target = packed + i * kc + k0 * MR;
            for (int k = k0; k < k1; k++, s += a_col, target += MR) STORE_LOCAL(target, LOAD(s));
        }
    }
    for (int i = 0; i < rows; i += MR) {
        const int m = rows - i < MR ? rows - i : MR;
        for (int k = i < whole ? last : 0; k < kc; k++)
            for (int r = 0; r < m; r++)
                packed[i * kc + k * MR + r] = a[(size_t)(i + r) * a_row + (size_t)k * a_col];
    }
}
#endif

// sum += the tile of a matrix with contiguous rows.
static inline void add_tile(vec sum[MR][2], __global const float *p, const int row)
{
    #pragma unroll
    for (int r = 0; r < MR; r++) {
        sum[r][0] += LOAD(p + (size_t)r * row);
        sum[r][1] += LOAD(p + (size_t)r * row + LANES);
    }
}

KERNEL gemm(TENSOR(a), TENSOR(b), TENSOR(bias), TENSOR(residual), TENSOR_OUT(out), const int M, const int N, const int K,
            const int depth, const int block_rows, const int block_cols, const int a_batch, const int a_row,
            const int a_col, const int b_batch, const int b_row, const int b_col, const int out_batch,
            const int out_row, const int out_col, const int has_bias, const int bias_col, const int has_residual,
            const int residual_batch, const int residual_row, const int residual_col EPILOGUE_PARAMETERS)
{
#if !HAS_ROWS
    __local float block[BLOCK_ROWS * KC];
#endif
#if !IS_PACKED
    __local float panel[KC * NR];
#endif
    const size_t batch = get_group_id(2);
    const int row0 = get_group_id(0) * block_rows, col0 = get_group_id(1) * block_cols;
    const int rows = M - row0 < block_rows ? M - row0 : block_rows;
    const int col1 = N - col0 < block_cols ? N : col0 + block_cols;
    const int vectors = out_col == 1 && (!has_residual || residual_col == 1) && (!has_bias || bias_col == 1);

    int k0 = 0;
    do {  // once even if K = 0: out = bias + residual
        const int kc = K - k0 < depth ? K - k0 : depth;
        __global const float *a = BASE(a) + batch * a_batch + (size_t)row0 * a_row + (size_t)k0 * a_col;
#if !HAS_ROWS
        pack_a(a, a_row, a_col, block, rows, kc);
#endif
        int start = col0;  // of the columns that are finished but for the epilogue
        for (int j = col0; j < col1; j += NR) {
            const int n = col1 - j < NR ? col1 - j : NR;
#if IS_PACKED
            __global const float *panel = BASE(b) + batch * b_batch + (size_t)j * K + (size_t)k0 * NR;
#else
            pack_panel(BASE(b) + batch * b_batch + (size_t)k0 * b_row + (size_t)j * b_col, b_row, b_col, panel, kc, n);
#endif
            __global float *o = BASE(out) + batch * out_batch + (size_t)row0 * out_row + (size_t)j * out_col;
            __global const float *z = BASE(residual) + batch * residual_batch + (size_t)row0 * residual_row
                                      + (size_t)j * residual_col;
            __global const float *w = BASE(bias) + (size_t)j * bias_col;
            for (int i = 0; i < rows; i += MR, o += (size_t)MR * out_row, z += (size_t)MR * residual_row) {
                const int m = rows - i < MR ? rows - i : MR;
                vec sum[MR][2];
                #pragma unroll
                for (int r = 0; r < MR; r++) sum[r][0] = sum[r][1] = 0.0f;
#if HAS_ROWS
                __global const float *row[MR];  // where there are less than MR, the last one again
                #pragma unroll
                for (int r = 0; r < MR; r++) row[r] = a + (size_t)(i + (r < m ? r : m - 1)) * a_row;
#else
                __local const float *column = block + i * kc;
#endif
                PANEL const float *q = panel;
                for (int k = 0; k < kc; k++, q += NR) {
                    const vec b0 = LOAD_PANEL(q), b1 = LOAD_PANEL(q + LANES);
                    #pragma unroll
                    for (int r = 0; r < MR; r++) {
#if HAS_ROWS
                        const float x = row[r][k];
#else
                        const float x = column[k * MR + r];
#endif
                        sum[r][0] += x * b0;
                        sum[r][1] += x * b1;
                    }
                }
                if (vectors && m == MR && n == NR) {
                    if (k0 > 0) add_tile(sum, o, out_row);
                    if (k0 == 0 && has_bias) add_tile(sum, w, 0);
                    if (k0 == 0 && has_residual) add_tile(sum, z, residual_row);
                    #pragma unroll
                    for (int r = 0; r < MR; r++) {
                        STORE(o + (size_t)r * out_row, sum[r][0]);
                        STORE(o + (size_t)r * out_row + LANES, sum[r][1]);
                    }
                    continue;
                }
                union { vec v[MR][2]; float f[MR][NR]; } t;
                #pragma unroll
                for (int r = 0; r < MR; r++) t.v[r][0] = sum[r][0], t.v[r][1] = sum[r][1];
                for (int r = 0; r < m; r++)
                    for (int c = 0; c < n; c++) {
                        float x = t.f[r][c];
                        __global float *target = o + (size_t)r * out_row + (size_t)c * out_col;
                        if (k0 > 0) x += *target;
                        if (k0 == 0 && has_bias) x += w[(size_t)c * bias_col];
                        if (k0 == 0 && has_residual) x += z[(size_t)r * residual_row + (size_t)c * residual_col];
                        *target = x;
                    }
            }
#if HAS_EPILOGUE
            if (k0 + kc >= K && (j + n - start >= EPILOGUE_COLUMNS || j + n == col1)) {
                epilogue(batch * M + row0, batch * M + row0 + rows, start, j + n EPILOGUE_ARGUMENTS);
                start = j + n;
            }
#endif
        }
        k0 += kc;
    } while (k0 < K);
}

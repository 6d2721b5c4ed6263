// out = a @ b [+ bias] [+ residual], for every matrix of a batch.
//
//   a (B, M, K), b (B, K, N), out (B, M, N), residual (B, M, N): strides in elements, any (x_batch, x_row, x_col).
//   bias (N): stride bias_col.
//   gemm reads b in panels of NR columns side by side, rows b_row apart. Either b is such a thing as it stands: b_col = 1
//   and N a multiple of COLUMN_UNIT; then column j begins at j, and b_row, not 0, is its row stride. Or it is packed first:
//   gemm_pack_b writes, a group, COLUMN_UNIT columns as COLUMN_UNIT / NR panels of (K, NR), zeros after column N; then
//   column j begins at j * K, and b_row = 0 stands for NR.
//
// Work-group: one work-item. gemm: (ceil(M / block_rows), ceil(N / block_cols), B) groups, each one block of out;
// block_rows <= MAX_BLOCK_ROWS, block_cols a multiple of COLUMN_UNIT. gemm_pack_b: (ceil(N / COLUMN_UNIT), B) groups.
// Build constants: LANES (common.cl); KC, 384 or what local memory allows. The register tile follows: MR x NR = 6 x 16 (12 of 16 registers of 8 lanes are
// accumulators) or 14 x 32 (28 of 32 registers of 16 lanes). A block of a, at most MAX_BLOCK_ROWS x KC, is copied to
// local memory: it stays in the second-level cache while the group goes through its columns.
// Residual and bias are added with the first KC products, later ones accumulate in out: residual may be out itself.
// Order of a sum: k ascending in chunks of KC. It depends on K and KC alone, neither on blocks nor on cores.
// Tolerance: |error| <= K eps (|a| @ |b|), tests/kernel_harness.py.
// Source: Van Zee, van de Geijn, "BLIS: a framework for rapidly instantiating BLAS functionality", ACM TOMS 41(3) 2015.

#if LANES == 16
#define MR 14
#else
#define MR 6
#endif
#define NR (2 * LANES)
#ifndef KC
#define KC 384
#endif
#define COLUMN_UNIT 32
#define MAX_BLOCK_ROWS 84

// Panels of LANES columns of a b that lies transposed (b_row = 1), LANES x LANES elements at a time.
static inline void pack_transposed(__global const float *s, const int b_col, __global float *target, const int K)
{
    int k = 0;
    for (; k + LANES <= K; k += LANES) {
        vec tile[LANES];
        #pragma unroll
        for (int i = 0; i < LANES; i++) tile[i] = LOAD(s + (size_t)i * b_col + k);
        transpose(tile);
        #pragma unroll
        for (int i = 0; i < LANES; i++) STORE(target + (size_t)(k + i) * NR, tile[i]);
    }
    for (; k < K; k++)
        for (int i = 0; i < LANES; i++) target[(size_t)k * NR + i] = s[(size_t)i * b_col + k];
}

KERNEL gemm_pack_b(TENSOR(b), TENSOR_OUT(packed), const int K, const int N, const int b_batch, const int b_row,
                   const int b_col)
{
    const size_t unit = get_group_id(0), batch = get_group_id(1);
    __global float *target = BASE(packed) + (batch * get_num_groups(0) + unit) * K * COLUMN_UNIT;
    for (int j = unit * COLUMN_UNIT; j < (int)(unit + 1) * COLUMN_UNIT; j += NR, target += (size_t)K * NR) {
        const int n = N - j < NR ? N - j : NR;
        __global const float *s = BASE(b) + batch * b_batch + (size_t)j * b_col;
        if (n == NR && b_col == 1) {
            for (int k = 0; k < K; k++)
                for (int v = 0; v < NR; v += LANES)
                    STORE(target + (size_t)k * NR + v, LOAD(s + (size_t)k * b_row + v));
        } else if (n == NR && b_row == 1) {
            pack_transposed(s, b_col, target, K);
            pack_transposed(s + (size_t)LANES * b_col, b_col, target + LANES, K);
        } else {
            for (int k = 0; k < K; k++)
                for (int i = 0; i < NR; i++)
                    target[(size_t)k * NR + i] = i < n ? s[(size_t)k * b_row + (size_t)i * b_col] : 0.0f;
        }
    }
}

// Panels of a in local memory, MR rows each: (MR, KC) if its rows lie contiguous, else (KC, MR); both copy what lies
// side by side. Rows that don't exist stay as they are: their products are never stored.
static inline void pack_a(__global const float *a, const int a_row, const int a_col, __local float *packed,
                          const int rows, const int kc)
{
    if (a_col == 1) {
        for (int i = 0; i < rows; i++, a += a_row, packed += KC) {
            int k = 0;
            for (; k + LANES <= kc; k += LANES) STORE_LOCAL(packed + k, LOAD(a + k));
            for (; k < kc; k++) packed[k] = a[k];
        }
        return;
    }
    // LANES > MR: what is read and written too much is overwritten by the next k; so the last k goes one by one.
    const int whole = a_row == 1 && a_col >= LANES ? rows / MR * MR : 0, last = kc > 0 ? kc - 1 : 0;
    for (int k = 0; k < last; k++)
        for (int i = 0; i < whole; i += MR)
            STORE_LOCAL(packed + i * KC + k * MR, LOAD(a + (size_t)k * a_col + i));
    for (int i = 0; i < rows; i += MR) {
        const int m = rows - i < MR ? rows - i : MR;
        for (int k = i < whole ? last : 0; k < kc; k++)
            for (int r = 0; r < m; r++)
                packed[i * KC + k * MR + r] = a[(size_t)(i + r) * a_row + (size_t)k * a_col];
    }
}

// sum += the products of one panel of a and one of b. r_stride and k_stride are constants where it is inlined.
static inline void multiply(vec sum[MR][2], __local const float *a, const int r_stride, const int k_stride,
                            __global const float *b, const int b_row, const int kc)
{
    for (int k = 0; k < kc; k++, a += k_stride, b += b_row) {
        const vec b0 = LOAD(b), b1 = LOAD(b + LANES);
        #pragma unroll
        for (int r = 0; r < MR; r++) {
            sum[r][0] += a[r * r_stride] * b0;
            sum[r][1] += a[r * r_stride] * b1;
        }
    }
}

KERNEL gemm(TENSOR(a), TENSOR(b), TENSOR(bias), TENSOR(residual), TENSOR_OUT(out), const int M, const int N, const int K,
            const int block_rows, const int block_cols, const int a_batch, const int a_row, const int a_col,
            const int b_batch, const int b_column, const int b_row_or_packed, const int out_batch, const int out_row,
            const int out_col, const int has_bias, const int bias_col, const int has_residual,
            const int residual_batch, const int residual_row, const int residual_col)
{
    __local float block[MAX_BLOCK_ROWS * KC];
    const size_t batch = get_group_id(2);
    const int row0 = get_group_id(0) * block_rows, col0 = get_group_id(1) * block_cols;
    const int rows = M - row0 < block_rows ? M - row0 : block_rows;
    const int col1 = N - col0 < block_cols ? N : col0 + block_cols;
    const int b_row = b_row_or_packed == 0 ? NR : b_row_or_packed;
    const int vectors = out_col == 1 && (!has_residual || residual_col == 1) && (!has_bias || bias_col == 1);

    int k0 = 0;
    do {  // once even if K = 0: out = bias + residual
        const int kc = K - k0 < KC ? K - k0 : KC;
        pack_a(BASE(a) + batch * a_batch + (size_t)row0 * a_row + (size_t)k0 * a_col, a_row, a_col, block, rows, kc);
        for (int j = col0; j < col1; j += NR) {
            const int n = col1 - j < NR ? col1 - j : NR;
            __global const float *panel = BASE(b) + batch * b_batch + (size_t)j * b_column + (size_t)k0 * b_row;
            __global const float *w = BASE(bias) + (size_t)j * bias_col;
            for (int i = 0; i < rows; i += MR) {
                vec sum[MR][2];
                #pragma unroll
                for (int r = 0; r < MR; r++) sum[r][0] = sum[r][1] = 0.0f;
                if (a_col == 1) multiply(sum, block + i * KC, KC, 1, panel, b_row, kc);
                else multiply(sum, block + i * KC, 1, MR, panel, b_row, kc);

                const int m = rows - i < MR ? rows - i : MR;
                const size_t row = row0 + i;
                __global float *o = BASE(out) + batch * out_batch + row * out_row + (size_t)j * out_col;
                __global const float *z =
                    BASE(residual) + batch * residual_batch + row * residual_row + (size_t)j * residual_col;
                if (vectors && n == NR) {
                    #pragma unroll
                    for (int r = 0; r < MR; r++) {
                        if (r >= m) continue;
                        #pragma unroll
                        for (int v = 0; v < 2; v++) {
                            vec t = sum[r][v];
                            if (k0 > 0) t += LOAD(o + v * LANES);
                            if (k0 == 0 && has_bias) t += LOAD(w + v * LANES);
                            if (k0 == 0 && has_residual) t += LOAD(z + v * LANES);
                            STORE(o + v * LANES, t);
                        }
                        o += out_row;
                        z += residual_row;
                    }
                } else {
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
            }
        }
        k0 += kc;
    } while (k0 < K);
}

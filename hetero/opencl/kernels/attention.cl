// Scaled dot-product attention, forward and backward, without the T x S matrix of scores in global memory.
//
//   s[i, j] = scale * q[i] . k[j] + mask[i, j], -inf where is_causal and j > i      lse[i] = log(sum over j of exp(s[i, j]))
//   p[i, j] = exp(s[i, j] - lse[i])            out[i] = sum over j of z[i, j] p[i, j] v[j]
//
//   dp[i, j] = z[i, j] grad[i] . v[j]          ds[i, j] = p[i, j] (dp[i, j] - grad[i] . out[i])
//   dq[i] = scale * sum over j of ds[i, j] k[j]     dk[j] = scale * sum over i of ds[i, j] q[i]
//   dv[j] = sum over i of z[i, j] p[i, j] grad[i]   dmask = ds
//
//   z is 1 without dropout; with dropout of p it is 1 / (1 - p), or 0 with probability p. It isn't stored: see keep().
//
//   q, dq (B, H, T, E); k, dk (B, H / shared, S, E); v, dv (B, H / shared, S, F); out, grad (B, H, T, F); lse (B, H, T);
//   mask, dmask (B, H, T, S). `shared` queries' heads, neighbours, use the same head of k and v, and add up its gradients.
//   Each has strides batch, head, row, column, any: STRIDES(x). dq, dk, dv may be slices of one gradient. seed (2) int64.
//
// Work-group: one work-item. attention: (ceil(T / GROUP_QUERIES), B * H) groups; the sum over keys is rescaled whenever the
// maximum grows. attention_backward: (B * H / shared) groups; dq is accumulated in its place, block of keys after block.
// Build constants: LANES (common.cl); HAS_MASK, HAS_DROPOUT, HAS_MASK_GRADIENT: which arguments there are; BQ, BK,
// GROUP_QUERIES: multiples of TILE, of LANES and of BQ; BK of 16. Blocks: BQ queries x BK keys in local memory; rows there
// are padded to E4 and F4, multiples of 16, with zeros. Python chooses blocks that fit the
// device's local memory and gives the size: attention: BK (E4 + F4) + GROUP_QUERIES (E4 + F4 + 2)
// + BQ BK floats; attention_backward: 2 BK (E4 + F4) + BK (E4 + F4) + BQ (E4 + F4) + 2 BQ BK + BQ E4.
// Tolerance: eps (E + S) of the largest |value|; tests/kernel_harness.py.
// A row whose scores are all -inf gives zeros, its lse is 0 and so are its gradients, as in torch.
// Source: Dao, "FlashAttention-2", arXiv:2307.08691, algorithms 1 and 2 (here a block's work is a plain matrix product).

#ifndef BQ
#define BQ 32
#define BK 64
#define GROUP_QUERIES 128
#endif
#if LANES == 16
#define TILE 8
#else
#define TILE 4
#endif

#define STRIDES(x) const int x##_batch, const int x##_head, const int x##_row, const int x##_col
#define HEAD(x, head) (BASE(x) + (size_t)batch * x##_batch + (size_t)(head) * x##_head)

// c (rows, cols) [+]= a b in local memory; a by two strides, rows of b and c lie b_row and c_row apart.
// rows is a multiple of TILE, cols one of LANES; what is computed beside the matrix is padding.
static inline void multiply(__local float *c, const int c_row, __local const float *a, const int a_row, const int a_col,
                            __local const float *b, const int b_row, const int rows, const int cols, const int depth,
                            const int accumulate)
{
    for (int i = 0; i < rows; i += TILE) {
        __local const float *a_tile = a + i * a_row;
        int j = 0;
        for (; j + 2 * LANES <= cols; j += 2 * LANES) {
            vec sum[TILE][2];
            #pragma unroll
            for (int r = 0; r < TILE; r++) sum[r][0] = sum[r][1] = 0.0f;
            for (int k = 0; k < depth; k++) {
                const vec b0 = LOAD_LOCAL(b + k * b_row + j), b1 = LOAD_LOCAL(b + k * b_row + j + LANES);
                #pragma unroll
                for (int r = 0; r < TILE; r++) {
                    const float x = a_tile[r * a_row + k * a_col];
                    sum[r][0] += x * b0;
                    sum[r][1] += x * b1;
                }
            }
            #pragma unroll
            for (int r = 0; r < TILE; r++) {
                __local float *target = c + (i + r) * c_row + j;
                STORE_LOCAL(target, accumulate ? LOAD_LOCAL(target) + sum[r][0] : sum[r][0]);
                STORE_LOCAL(target + LANES, accumulate ? LOAD_LOCAL(target + LANES) + sum[r][1] : sum[r][1]);
            }
        }
        for (; j < cols; j += LANES) {
            vec sum[TILE];
            #pragma unroll
            for (int r = 0; r < TILE; r++) sum[r] = 0.0f;
            for (int k = 0; k < depth; k++) {
                const vec b0 = LOAD_LOCAL(b + k * b_row + j);
                #pragma unroll
                for (int r = 0; r < TILE; r++) sum[r] += a_tile[r * a_row + k * a_col] * b0;
            }
            #pragma unroll
            for (int r = 0; r < TILE; r++) {
                __local float *target = c + (i + r) * c_row + j;
                STORE_LOCAL(target, accumulate ? LOAD_LOCAL(target) + sum[r] : sum[r]);
            }
        }
    }
}

// n rows of `width` to local memory, times scale; zeros up to `padded` columns and `rows` rows.
static inline void fetch(__local float *target, __global const float *source, const int row, const int col, const int n,
                         const int rows, const int width, const int padded, const float scale)
{
    __global const float *end = source + (size_t)(n - 1) * row + (size_t)(width - 1) * col + 1;
    for (int r = 0; r < rows; r++, target += padded)
        for (int c = 0; c < padded; c += LANES) {
            const int left = r < n ? width - c : 0;
            vec t = 0.0f;
            if (left > 0) t = load_row(source + (size_t)r * row + (size_t)c * col, end, col, left, 0.0f) * scale;
            STORE_LOCAL(target + c, t);
        }
}

// The transpose of n rows of `width`: target[c * BK + r]; zeros for the rows after n.
static inline void fetch_transposed(__local float *target, __global const float *source, const int row, const int col,
                                    const int n, const int width)
{
    for (int r = 0; r < BK; r += LANES) {
        int c = 0;
        if (col == 1 && r + LANES <= n)
            for (; c + LANES <= width; c += LANES) {
                vec tile[LANES];
                #pragma unroll
                for (int i = 0; i < LANES; i++) tile[i] = LOAD(source + (size_t)(r + i) * row + c);
                transpose(tile);
                #pragma unroll
                for (int i = 0; i < LANES; i++) STORE_LOCAL(target + (c + i) * BK + r, tile[i]);
            }
        for (; c < width; c++)
            for (int i = 0; i < LANES; i++)
                target[c * BK + r + i] = r + i < n ? source[(size_t)(r + i) * row + (size_t)c * col] : 0.0f;
    }
}

// Rows of a block of scores that have to be looked at: up to the last key that the block's last query sees.
static inline int visible_keys(const int first_query, const int n_queries, const int first_key, const int n_keys,
                               const int is_causal)
{
    const int seen = first_query + n_queries - first_key;
    const int n = is_causal && seen < n_keys ? seen : n_keys;
    return (n + LANES - 1) / LANES * LANES;
}

#ifdef HAS_MASK
#define MASK_PARAMETERS , TENSOR(mask), STRIDES(mask)
// Adds a row of the mask, n elements, to a row of scores.
static inline void add_mask(__local float *scores, __global const float *mask, const int col, const int n)
{
    for (int c = 0; c < n; c += LANES)
        STORE_LOCAL(scores + c, LOAD_LOCAL(scores + c) + load_row(mask + (size_t)c * col, mask, col, n - c, 0.0f));
}
#else
#define MASK_PARAMETERS
#endif

#ifdef HAS_DROPOUT
#define DROPOUT_PARAMETERS , TENSOR_INT64(seed), const int stream, const int threshold, const float keep_scale
#define DROPOUT_ROW(head, i) \
    (ulong)BASE(seed)[0], (uint)(i), (uint)(head), (uint)BASE(seed)[1] + (uint)stream, (uint)threshold, keep_scale
#if LANES == 16
typedef uint16 uvec;
typedef ulong16 ulong_vec;
#else
typedef uint8 uvec;
typedef ulong8 ulong_vec;
#endif

// Philox4x32-10 of LANES counters at a time (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11).
static inline void philox(uvec *c, const ulong key)
{
    uint k0 = (uint)key, k1 = (uint)(key >> 32);
    #pragma unroll
    for (int round = 0; round < 10; round++) {
        const ulong_vec a = __builtin_convertvector(c[0], ulong_vec) * 0xD2511F53ul;
        const ulong_vec b = __builtin_convertvector(c[2], ulong_vec) * 0xCD9E8D57ul;
        c[0] = __builtin_convertvector(b >> 32, uvec) ^ c[1] ^ k0;
        c[2] = __builtin_convertvector(a >> 32, uvec) ^ c[3] ^ k1;
        c[1] = __builtin_convertvector(b, uvec);
        c[3] = __builtin_convertvector(a, uvec);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
}

// The words of 4 LANES keys: four counters' first words, then their second ones, and so on.
static inline void deal(uvec *bits, const uvec *w)
{
#ifdef NO_SHUFFLES
    for (int i = 0; i < 4 * LANES; i++) ((uint *)bits)[i] = ((const uint *)&w[i / 4 % 4])[i / 16 * 4 + i % 4];
#elif LANES == 16
    bits[0] = (uvec)(w[0].lo.lo, w[1].lo.lo, w[2].lo.lo, w[3].lo.lo);
    bits[1] = (uvec)(w[0].lo.hi, w[1].lo.hi, w[2].lo.hi, w[3].lo.hi);
    bits[2] = (uvec)(w[0].hi.lo, w[1].hi.lo, w[2].hi.lo, w[3].hi.lo);
    bits[3] = (uvec)(w[0].hi.hi, w[1].hi.hi, w[2].hi.hi, w[3].hi.hi);
#else
    bits[0] = (uvec)(w[0].lo, w[1].lo), bits[1] = (uvec)(w[2].lo, w[3].lo);
    bits[2] = (uvec)(w[0].hi, w[1].hi), bits[3] = (uvec)(w[2].hi, w[3].hi);
#endif
}

// z of 4 LANES keys from j on, a multiple of 16, for query i of head h (of B * H): keep_scale where 32 random bits reach
// the threshold, else 0. The bits of key j are word j / 4 % 4 of counter (j / 16 * 4 + j % 4, i, h, stream).
static inline void keep(vec *z, const int j, const ulong key, const uint i, const uint h, const uint stream,
                        const uint threshold, const float keep_scale)
{
    uvec w[4] = {__builtin_convertvector(LANE_INDEX + j / 4, uvec), i, h, stream};
    philox(w, key);
    uvec bits[4];
    deal(bits, w);
    #pragma unroll
    for (int k = 0; k < 4; k++) z[k] = bits[k] >= threshold ? (vec)(keep_scale) : (vec)(0.0f);
}

// z of a row's keys j0 to j0 + cols; 4 LANES at a time, so that up to 4 LANES - 1 elements more are written.
static inline void keep_row(vec *z, const int j0, const int cols, const ulong key, const uint i, const uint h,
                            const uint stream, const uint threshold, const float keep_scale)
{
    for (int c = 0; c < cols; c += 4 * LANES) keep(z + c / LANES, j0 + c, key, i, h, stream, threshold, keep_scale);
}
#define KEPT_VECTORS ((BK + 4 * LANES - 1) / (4 * LANES) * 4)
#else
#define DROPOUT_PARAMETERS
#endif

#ifdef HAS_MASK_GRADIENT
#define MASK_GRADIENT_PARAMETERS , TENSOR_OUT(dmask), STRIDES(dmask)
#else
#define MASK_GRADIENT_PARAMETERS
#endif

KERNEL attention(TENSOR(q), TENSOR(k), TENSOR(v), TENSOR_OUT(out), TENSOR_OUT(lse), __local float *memory, const int H,
                 const int shared, const int T, const int S, const int E, const int F, const float scale,
                 const int is_causal, STRIDES(q), STRIDES(k), STRIDES(v), STRIDES(out), const int lse_batch,
                 const int lse_head, const int lse_row MASK_PARAMETERS DROPOUT_PARAMETERS)
{
    const int batch = get_group_id(1) / H, head = get_group_id(1) % H;
    const int E4 = (E + 15) / 16 * 16, F4 = (F + 15) / 16 * 16;
    __local float *keys = memory, *values = keys + BK * E4, *queries = values + BK * F4;
    __local float *sums = queries + GROUP_QUERIES * E4, *scores = sums + GROUP_QUERIES * F4;
    __local float *largest = scores + BQ * BK, *total = largest + GROUP_QUERIES;
    const int i0 = get_group_id(0) * GROUP_QUERIES;
    const int n_queries = T - i0 < GROUP_QUERIES ? T - i0 : GROUP_QUERIES;
    const int padded_queries = (n_queries + TILE - 1) / TILE * TILE;

    fetch(queries, HEAD(q, head) + (size_t)i0 * q_row, q_row, q_col, n_queries, padded_queries, E, E4, scale);
    for (int i = 0; i < padded_queries; i++) largest[i] = -INFINITY, total[i] = 0.0f;
    for (int i = 0; i < padded_queries * F4; i += LANES) STORE_LOCAL(sums + i, (vec)(0.0f));

    const int last_key = is_causal && i0 + n_queries < S ? i0 + n_queries : S;
    for (int j0 = 0; j0 < last_key; j0 += BK) {
        const int n_keys = S - j0 < BK ? S - j0 : BK;
        fetch_transposed(keys, HEAD(k, head / shared) + (size_t)j0 * k_row, k_row, k_col, n_keys, E);
        fetch(values, HEAD(v, head / shared) + (size_t)j0 * v_row, v_row, v_col, n_keys, BK, F, F4, 1.0f);
        for (int b = 0; b < padded_queries; b += BQ) {
            const int rows = padded_queries - b < BQ ? padded_queries - b : BQ;
            if (is_causal && i0 + b + rows <= j0) continue;
            const int cols = visible_keys(i0 + b, rows, j0, n_keys, is_causal);
            multiply(scores, BK, queries + b * E4, E4, 1, keys, BK, rows, cols, E, 0);
            for (int r = 0; r < rows; r++) {
#ifdef HAS_MASK
                if (b + r < n_queries)
                    add_mask(scores + r * BK, HEAD(mask, head) + (size_t)(i0 + b + r) * mask_row + (size_t)j0 * mask_col,
                             mask_col, cols < n_keys ? cols : n_keys);
#endif
                const int seen = is_causal && i0 + b + r - j0 + 1 < n_keys ? i0 + b + r - j0 + 1 : n_keys;
                __local float *s = scores + r * BK;
                vec top = -INFINITY;
                for (int c = 0; c < cols; c += LANES) {
                    vec t = LOAD_LOCAL(s + c);
                    if (c + LANES > seen) {
                        t = LANE_INDEX + c < seen ? t : (vec)(-INFINITY);
                        STORE_LOCAL(s + c, t);
                    }
                    top = larger(top, t);
                }
                const float old = largest[b + r], m = larger(old, larger_lanes(top));  // a NaN comes back in the sum
                const float shift = m == -INFINITY ? 0.0f : m;
                const float rescale = exp_(old - shift);
                vec sum = 0.0f;
                for (int c = 0; c < cols; c += LANES) {
                    const vec e = exp_(LOAD_LOCAL(s + c) - shift);
                    sum += e;
                    STORE_LOCAL(s + c, e);
                }
#ifdef HAS_DROPOUT
                vec z[KEPT_VECTORS];
                keep_row(z, j0, cols, DROPOUT_ROW(get_group_id(1), i0 + b + r));
                for (int c = 0; c < cols; c += LANES) STORE_LOCAL(s + c, LOAD_LOCAL(s + c) * z[c / LANES]);
#endif
                largest[b + r] = m;
                total[b + r] = total[b + r] * rescale + sum_lanes(sum);
                if (rescale != 1.0f)
                    for (int c = 0; c < F4; c += LANES) {
                        __local float *o = sums + (b + r) * F4 + c;
                        STORE_LOCAL(o, LOAD_LOCAL(o) * rescale);
                    }
            }
            const int depth = cols < n_keys ? cols : n_keys;
            multiply(sums + b * F4, F4, scores, BK, 1, values, F4, rows, F4, depth, 1);
        }
    }
    __global float *lse = HEAD(lse, head);
    for (int i = 0; i < n_queries; i++) {
        const float scale_row = total[i] == 0.0f ? 0.0f : 1.0f / total[i];  // 0: no key is seen
        __global float *o = HEAD(out, head) + (size_t)(i0 + i) * out_row;
        for (int c = 0; c < F; c += LANES)
            store_row(o + (size_t)c * out_col, out_col, F - c, LOAD_LOCAL(sums + i * F4 + c) * scale_row);
        lse[(size_t)(i0 + i) * lse_row] = total[i] == 0.0f ? 0.0f : largest[i] + log_(total[i]);
    }
}

KERNEL attention_backward(TENSOR(grad), TENSOR(q), TENSOR(k), TENSOR(v), TENSOR(out), TENSOR(lse), TENSOR_OUT(dq),
                          TENSOR_OUT(dk), TENSOR_OUT(dv), __local float *memory, const int H, const int shared,
                          const int T, const int S, const int E, const int F, const float scale, const int is_causal,
                          STRIDES(grad), STRIDES(q), STRIDES(k), STRIDES(v), STRIDES(out), const int lse_batch,
                          const int lse_head, const int lse_row, STRIDES(dq), STRIDES(dk),
                          STRIDES(dv) MASK_PARAMETERS DROPOUT_PARAMETERS MASK_GRADIENT_PARAMETERS)
{
    const int batch = get_group_id(0) / (H / shared), shared_head = get_group_id(0) % (H / shared);
    const int E4 = (E + 15) / 16 * 16, F4 = (F + 15) / 16 * 16;
    __local float *keys = memory, *keys_transposed = keys + BK * E4, *values_transposed = keys_transposed + BK * E4;
    __local float *key_sums = values_transposed + BK * F4, *value_sums = key_sums + BK * E4;
    __local float *queries = value_sums + BK * F4, *grads = queries + BQ * E4;
    __local float *weights = grads + BQ * F4, *slopes = weights + BQ * BK, *query_sums = slopes + BQ * BK;

    for (int j0 = 0; j0 < S; j0 += BK) {
        const int n_keys = S - j0 < BK ? S - j0 : BK;
        fetch(keys, HEAD(k, shared_head) + (size_t)j0 * k_row, k_row, k_col, n_keys, BK, E, E4, scale);
        fetch_transposed(keys_transposed, HEAD(k, shared_head) + (size_t)j0 * k_row, k_row, k_col, n_keys, E);
        fetch_transposed(values_transposed, HEAD(v, shared_head) + (size_t)j0 * v_row, v_row, v_col, n_keys, F);
        for (int i = 0; i < BK * E4; i += LANES) STORE_LOCAL(key_sums + i, (vec)(0.0f));
        for (int i = 0; i < BK * F4; i += LANES) STORE_LOCAL(value_sums + i, (vec)(0.0f));

        for (int head = shared_head * shared; head < (shared_head + 1) * shared; head++) {
            __global const float *lse = HEAD(lse, head);
            // causal: queries before the first key don't see the block; the first block of keys is seen by all
            for (int i0 = is_causal ? j0 / BQ * BQ : 0; i0 < T; i0 += BQ) {
                const int n = T - i0 < BQ ? T - i0 : BQ, rows = (n + TILE - 1) / TILE * TILE;
                const int cols = visible_keys(i0, rows, j0, n_keys, is_causal);
                fetch(queries, HEAD(q, head) + (size_t)i0 * q_row, q_row, q_col, n, rows, E, E4, scale);
                fetch(grads, HEAD(grad, head) + (size_t)i0 * grad_row, grad_row, grad_col, n, rows, F, F4, 1.0f);
                multiply(weights, BK, queries, E4, 1, keys_transposed, BK, rows, cols, E, 0);
                multiply(slopes, BK, grads, F4, 1, values_transposed, BK, rows, cols, F, 0);
                for (int r = 0; r < rows; r++) {
#ifdef HAS_MASK
                    if (r < n)
                        add_mask(weights + r * BK, HEAD(mask, head) + (size_t)(i0 + r) * mask_row + (size_t)j0 * mask_col,
                                 mask_col, cols < n_keys ? cols : n_keys);
#endif
#ifdef HAS_DROPOUT
                    vec z[KEPT_VECTORS];
                    keep_row(z, j0, cols, DROPOUT_ROW(batch * H + head, i0 + r));
#endif
                    const int seen_all = is_causal && i0 + r - j0 + 1 < n_keys ? i0 + r - j0 + 1 : n_keys;
                    const int seen = r < n ? seen_all : 0;
                    const float shift = r < n ? lse[(size_t)(i0 + r) * lse_row] : 0.0f;
                    vec dot = 0.0f;
                    __global const float *o = HEAD(out, head) + (size_t)(i0 + r) * out_row;
                    if (r < n)
                        for (int c = 0; c < F; c += LANES)
                            dot += LOAD_LOCAL(grads + r * F4 + c)
                                   * load_row(o + (size_t)c * out_col, o, out_col, F - c, 0.0f);
                    const float delta = sum_lanes(dot);
                    for (int c = 0; c < cols; c += LANES) {
                        __local float *w = weights + r * BK + c, *d = slopes + r * BK + c;
                        vec p = exp_(LOAD_LOCAL(w) - shift);
#ifdef HAS_DROPOUT
                        vec ds = p * (z[c / LANES] * LOAD_LOCAL(d) - delta);
                        p *= z[c / LANES];
#else
                        vec ds = p * (LOAD_LOCAL(d) - delta);
#endif
                        if (c + LANES > seen) {
                            p = LANE_INDEX + c < seen ? p : (vec)(0.0f);
                            ds = LANE_INDEX + c < seen ? ds : (vec)(0.0f);
                        }
                        STORE_LOCAL(w, p);
                        STORE_LOCAL(d, ds);
#ifdef HAS_MASK_GRADIENT
                        if (r < n && c < n_keys)
                            store_row(HEAD(dmask, head) + (size_t)(i0 + r) * dmask_row + (size_t)(j0 + c) * dmask_col,
                                      dmask_col, n_keys - c, ds);
#endif
                    }
                }
                const int key_rows = (cols + TILE - 1) / TILE * TILE;
                multiply(key_sums, E4, slopes, 1, BK, queries, E4, key_rows, E4, n, 1);
                multiply(value_sums, F4, weights, 1, BK, grads, F4, key_rows, F4, n, 1);
                multiply(query_sums, E4, slopes, BK, 1, keys, E4, rows, E4, cols < n_keys ? cols : n_keys, 0);
                for (int r = 0; r < n; r++) {
                    __global float *target = HEAD(dq, head) + (size_t)(i0 + r) * dq_row;
                    for (int c = 0; c < E; c += LANES) {
                        vec t = LOAD_LOCAL(query_sums + r * E4 + c);
                        if (j0 > 0) t += load_row(target + (size_t)c * dq_col, target, dq_col, E - c, 0.0f);
                        store_row(target + (size_t)c * dq_col, dq_col, E - c, t);
                    }
                }
            }
        }
        for (int r = 0; r < n_keys; r++) {
            for (int c = 0; c < E; c += LANES)
                store_row(HEAD(dk, shared_head) + (size_t)(j0 + r) * dk_row + (size_t)c * dk_col, dk_col, E - c,
                          LOAD_LOCAL(key_sums + r * E4 + c));
            for (int c = 0; c < F; c += LANES)
                store_row(HEAD(dv, shared_head) + (size_t)(j0 + r) * dv_row + (size_t)c * dv_col, dv_col, F - c,
                          LOAD_LOCAL(value_sums + r * F4 + c));
        }
    }
}

// Scaled dot-product attention, forward and backward, on GPU-type devices; formulas, mask and dropout: attention.cl.
//
//   q, dq (B, H, T, E); k, dk (B, H / shared, S, E); v, dv (B, H / shared, S, F); out, grad (B, H, T, F); lse (B, H, T);
//   mask, dmask (B, H, T, S). `shared` queries' heads, neighbours, use the same head of k and v, and add up its gradients.
//   Each has strides batch, head, row, column, any: STRIDES(x). dq, dk, dv may be slices of one gradient. seed (2) int64.
//
// Work-group: GROUP_X x GROUP_Y work-items share a head's block of BQ queries (attention, attention_queries) or of BK keys
// (attention_keys) and go through the blocks of the other side. Groups: B * H * ceil(T / BQ) or B * H / shared * ceil(S / BK).
// A block of scores is BQ x BK: work-item (X, Y) has the queries Y + i GROUP_Y and the keys X + j GROUP_X in registers; of
// what is summed, out, dq, dk, dv, it has the same rows and the columns X + c GROUP_X.
// Backward: attention_queries computes dq and dmask, attention_keys dk and dv; both compute the scores again. So every element is
// summed by one work-item, in a fixed order, without atomics.
// Build constants: E, F; BQ, BK: multiples of GROUP_Y and GROUP_X; BACKWARD: which kernels are built, attention or the
// others; HAS_MASK, HAS_DROPOUT, HAS_MASK_GRADIENT: which arguments there are.
// Local memory in floats, WIDE = max(E, F): attention: BQ (E + 1) + BK (WIDE + 1) + BQ (BK + 1) + BQ GROUP_X;
// attention_queries: (BQ + BK) (E + F + 2) + BQ (BK + 1) + BQ GROUP_X; attention_keys: another BQ (BK + 1).
// Rows in local memory have one more element than columns, so that work-items that read a column meet different banks.
// Tolerance: eps (E + S) of the largest |value|; tests/kernel_harness.py.
// A row whose scores are all -inf gives zeros, its lse is 0 and so are its gradients, as in torch.
// Source: Dao, "FlashAttention-2", arXiv:2307.08691, algorithms 1 and 2; the partition over queries for dq is its section 3.2's.

#define ROWS (BQ / GROUP_Y)
#define KEYS (BK / GROUP_X)
#define KEY_ROWS (BK / GROUP_Y)
#define E_COLS ((E + GROUP_X - 1) / GROUP_X)
#define F_COLS ((F + GROUP_X - 1) / GROUP_X)
#define WIDE (E > F ? E : F)

#define STRIDES(x) const int x##_batch, const int x##_head, const int x##_row, const int x##_col
#define HEAD(x, head) (BASE(x) + (size_t)batch * x##_batch + (size_t)(head) * x##_head)
// Of the group its batch, its head of n_head ones, and the first row of its block.
#define GROUP_OF(head, n_head, first, length, block)                                              \
    const int n_blocks = ((length) + (block) - 1) / (block), any_head = get_group_id(0) / n_blocks; \
    const int batch = any_head / (n_head), head = any_head % (n_head);                            \
    const int first = get_group_id(0) % n_blocks * (block);

#define QUERY(i) (Y + (i) * GROUP_Y)
#define KEY(j) (X + (j) * GROUP_X)
// Column c of a row with `width` of them: where the width is a multiple of GROUP_X the compiler drops the condition.
#define COLUMN(c) (X + (c) * GROUP_X)
#define IS_COLUMN(c, width) ((width) % GROUP_X == 0 || COLUMN(c) < (width))
#define EACH(i, n) _Pragma("unroll") for (int i = 0; i < (n); i++)

// `rows` rows of `width` elements to local memory, times scale; zeros after the first n.
INLINE void fetch(__local float *tile, __global const float *source, const int row, const int col, const int n,
                         const int rows, const int width, const float scale)
{
    for (int i = ITEM; i < rows * width; i += GROUP_ITEMS) {
        const int r = i / width, c = i % width;
        tile[r * (width + 1) + c] = r < n ? source[(size_t)r * row + (size_t)c * col] * scale : 0.0f;
    }
}

// The products of all queries and keys, or of gradients and values, of a block.
INLINE void score(float result[ROWS][KEYS], __local const float *queries, __local const float *keys, const int width)
{
    EACH(i, ROWS) EACH(j, KEYS) result[i][j] = 0.0f;
    for (int e = 0; e < width; e++) {
        float x[ROWS], y[KEYS];
        EACH(i, ROWS) x[i] = queries[QUERY(i) * (width + 1) + e];
        EACH(j, KEYS) y[j] = keys[KEY(j) * (width + 1) + e];
        EACH(i, ROWS) EACH(j, KEYS) result[i][j] += x[i] * y[j];
    }
}

#ifdef BACKWARD
// Of each query of a block the sum over columns of grad * out; all work-items of a row get it. parts: (BQ, GROUP_X).
INLINE void deltas(float delta[ROWS], __local const float *grads, __global const float *out, const int out_row,
                          const int out_col, const int n, __local float *parts)
{
    EACH(i, ROWS) {
        float part = 0.0f;
        if (QUERY(i) < n)
            for (int c = X; c < F; c += GROUP_X)
                part += grads[QUERY(i) * (F + 1) + c] * out[(size_t)QUERY(i) * out_row + (size_t)c * out_col];
        parts[QUERY(i) * GROUP_X + X] = part;
    }
    BARRIER;
    EACH(i, ROWS) {
        delta[i] = 0.0f;
        for (int x = 0; x < GROUP_X; x++) delta[i] += parts[QUERY(i) * GROUP_X + x];
    }
}

#endif

INLINE int at_most(const int a, const int b) { return a < b ? a : b; }

#ifdef HAS_MASK
#define MASK_PARAMETERS , TENSOR(mask), STRIDES(mask)
#define MASKED(s, i, j) ((s) + HEAD(mask, head)[(size_t)(i) * mask_row + (size_t)(j) * mask_col])
#else
#define MASK_PARAMETERS
#define MASKED(s, i, j) (s)
#endif

#ifdef HAS_MASK_GRADIENT
#define MASK_GRADIENT_PARAMETERS , TENSOR_OUT(dmask), STRIDES(dmask)
#else
#define MASK_GRADIENT_PARAMETERS
#endif

#ifdef HAS_DROPOUT
#define DROPOUT_PARAMETERS , TENSOR_INT64(seed), const int stream, const int threshold, const float keep_scale
#define KEEP(i, j) \
    keep(i, j, batch * H + head, (ulong)BASE(seed)[0], (uint)BASE(seed)[1] + (uint)stream, (uint)threshold, keep_scale)
// z of query i and key j of head h (of B * H), as in attention.cl: by word j / 4 % 4 of Philox4x32-10's counter
// (j / 16 * 4 + j % 4, i, h, stream) (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11).
INLINE float keep(const int i, const int j, const int h, const ulong key, const uint stream, const uint threshold,
                         const float keep_scale)
{
    uint c0 = j / 16 * 4 + j % 4, c1 = i, c2 = h, c3 = stream, k0 = (uint)key, k1 = (uint)(key >> 32);
    for (int round = 0; round < 10; round++) {
        const uint a = mul_hi(c0, 0xD2511F53u), b = mul_hi(c2, 0xCD9E8D57u);
        const uint next1 = c2 * 0xCD9E8D57u, next3 = c0 * 0xD2511F53u;
        c0 = b ^ c1 ^ k0;
        c2 = a ^ c3 ^ k1;
        c1 = next1;
        c3 = next3;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    const int word = j / 4 % 4;
    return (word == 0 ? c0 : word == 1 ? c1 : word == 2 ? c2 : c3) >= threshold ? keep_scale : 0.0f;
}
#else
#define DROPOUT_PARAMETERS
#define KEEP(i, j) 1.0f
#endif

#ifndef BACKWARD
KERNEL attention(TENSOR(q), TENSOR(k), TENSOR(v), TENSOR_OUT(out), TENSOR_OUT(lse), const int H, const int shared,
                 const int T, const int S, const float scale, const int is_causal, STRIDES(q), STRIDES(k), STRIDES(v),
                 STRIDES(out), const int lse_batch, const int lse_head, const int lse_row MASK_PARAMETERS DROPOUT_PARAMETERS)
{
    __local float queries[BQ * (E + 1)], tile[BK * (WIDE + 1)], weights[BQ * (BK + 1)], parts[BQ * GROUP_X];
    GROUP_OF(head, H, i0, T, BQ)
    const int n_queries = at_most(T - i0, BQ);
    const int n_seen = is_causal ? at_most(S, i0 + n_queries) : S;  // keys that any query of the block sees
    float largest[ROWS], total[ROWS], sums[ROWS][F_COLS];
    EACH(i, ROWS) {
        largest[i] = -INFINITY;
        total[i] = 0.0f;
        EACH(c, F_COLS) sums[i][c] = 0.0f;
    }
    fetch(queries, HEAD(q, head) + (size_t)i0 * q_row, q_row, q_col, n_queries, BQ, E, scale);

    for (int j0 = 0; j0 < n_seen; j0 += BK) {
        const int n_keys = at_most(n_seen - j0, BK);
        fetch(tile, HEAD(k, head / shared) + (size_t)j0 * k_row, k_row, k_col, n_keys, BK, E, 1.0f);
        BARRIER;
        float s[ROWS][KEYS];
        score(s, queries, tile, E);
        EACH(i, ROWS) {
            float m = -INFINITY;
            EACH(j, KEYS) {
                const int is_seen = KEY(j) < n_keys && (!is_causal || j0 + KEY(j) <= i0 + QUERY(i));
                s[i][j] = is_seen && QUERY(i) < n_queries ? MASKED(s[i][j], i0 + QUERY(i), j0 + KEY(j)) : -INFINITY;
                m = larger(s[i][j], m);
            }
            parts[QUERY(i) * GROUP_X + X] = m;
        }
        BARRIER;  // the keys are done with as well
        fetch(tile, HEAD(v, head / shared) + (size_t)j0 * v_row, v_row, v_col, n_keys, BK, F, 1.0f);
        EACH(i, ROWS) {
            float m = largest[i];
            for (int x = 0; x < GROUP_X; x++) m = larger(parts[QUERY(i) * GROUP_X + x], m);
            const float shift = m == -INFINITY ? 0.0f : m;  // so that a row without any key so far stays 0
            const float factor = exp(largest[i] - shift);
            largest[i] = m;
            total[i] *= factor;
            EACH(c, F_COLS) sums[i][c] *= factor;
            EACH(j, KEYS) {
                const float p = exp(s[i][j] - shift);
                total[i] += p;  // of this work-item's keys
                weights[QUERY(i) * (BK + 1) + KEY(j)] = p * KEEP(i0 + QUERY(i), j0 + KEY(j));
            }
        }
        BARRIER;
        for (int j = 0; j < n_keys; j++) {
            float p[ROWS];
            EACH(i, ROWS) p[i] = weights[QUERY(i) * (BK + 1) + j];
            EACH(c, F_COLS) if (IS_COLUMN(c, F)) {
                const float x = tile[j * (F + 1) + COLUMN(c)];
                EACH(i, ROWS) sums[i][c] += p[i] * x;
            }
        }
        BARRIER;
    }

    EACH(i, ROWS) parts[QUERY(i) * GROUP_X + X] = total[i];
    BARRIER;
    __global float *o = HEAD(out, head) + (size_t)i0 * out_row;
    EACH(i, ROWS) {
        float sum = 0.0f;
        for (int x = 0; x < GROUP_X; x++) sum += parts[QUERY(i) * GROUP_X + x];
        if (QUERY(i) >= n_queries) continue;
        const int is_blind = sum == 0.0f;  // it sees no key
        EACH(c, F_COLS) if (IS_COLUMN(c, F))
            o[(size_t)QUERY(i) * out_row + (size_t)COLUMN(c) * out_col] = is_blind ? 0.0f : sums[i][c] / sum;
        if (X == 0) HEAD(lse, head)[(size_t)(i0 + QUERY(i)) * lse_row] = is_blind ? 0.0f : largest[i] + log(sum);
    }
}

#else

// Of a block: ds = p (z dp - delta), p = exp(s - lse), into `slopes`; then USE(i, j, ds, z p). 0 where the query doesn't see
// the key. Arguments of the kernel are used by name.
#define SLOPES(USE)                                                                                                      \
    {                                                                                                                    \
        float s[ROWS][KEYS], d[ROWS][KEYS];                                                                              \
        score(s, queries, keys, E);                                                                                      \
        score(d, grads, values, F);                                                                                      \
        EACH(i, ROWS) EACH(j, KEYS) {                                                                                    \
            float ds = 0.0f, weight = 0.0f;                                                                              \
            if (QUERY(i) < n_queries && KEY(j) < n_keys && (!is_causal || j0 + KEY(j) <= i0 + QUERY(i))) {               \
                const float p = exp(MASKED(s[i][j], i0 + QUERY(i), j0 + KEY(j)) - shift[i]);                             \
                const float z = KEEP(i0 + QUERY(i), j0 + KEY(j));                                                        \
                ds = p * (z * d[i][j] - delta[i]);                                                                       \
                weight = p * z;                                                                                          \
            }                                                                                                            \
            slopes[QUERY(i) * (BK + 1) + KEY(j)] = ds;                                                                   \
            USE                                                                                                          \
        }                                                                                                                \
    }

#ifdef HAS_MASK_GRADIENT
#define STORE_SLOPE                                           \
    if (QUERY(i) < n_queries && KEY(j) < n_keys)              \
        HEAD(dmask, head)[(size_t)(i0 + QUERY(i)) * dmask_row + (size_t)(j0 + KEY(j)) * dmask_col] = ds;
#else
#define STORE_SLOPE
#endif

KERNEL attention_queries(TENSOR(grad), TENSOR(q), TENSOR(k), TENSOR(v), TENSOR(out), TENSOR(lse), TENSOR_OUT(dq),
                         const int H, const int shared, const int T, const int S, const float scale, const int is_causal,
                         STRIDES(grad), STRIDES(q), STRIDES(k), STRIDES(v), STRIDES(out), const int lse_batch,
                         const int lse_head, const int lse_row,
                         STRIDES(dq) MASK_PARAMETERS DROPOUT_PARAMETERS MASK_GRADIENT_PARAMETERS)
{
    __local float queries[BQ * (E + 1)], grads[BQ * (F + 1)], keys[BK * (E + 1)], values[BK * (F + 1)];
    __local float slopes[BQ * (BK + 1)], parts[BQ * GROUP_X];
    GROUP_OF(head, H, i0, T, BQ)
    const int n_queries = at_most(T - i0, BQ);
    const int n_seen = is_causal ? at_most(S, i0 + n_queries) : S;
    fetch(queries, HEAD(q, head) + (size_t)i0 * q_row, q_row, q_col, n_queries, BQ, E, scale);
    fetch(grads, HEAD(grad, head) + (size_t)i0 * grad_row, grad_row, grad_col, n_queries, BQ, F, 1.0f);
    BARRIER;
    float delta[ROWS], shift[ROWS], sums[ROWS][E_COLS];
    deltas(delta, grads, HEAD(out, head) + (size_t)i0 * out_row, out_row, out_col, n_queries, parts);
    EACH(i, ROWS) {
        shift[i] = QUERY(i) < n_queries ? HEAD(lse, head)[(size_t)(i0 + QUERY(i)) * lse_row] : 0.0f;
        EACH(c, E_COLS) sums[i][c] = 0.0f;
    }

    for (int j0 = 0; j0 < n_seen; j0 += BK) {
        const int n_keys = at_most(n_seen - j0, BK);
        fetch(keys, HEAD(k, head / shared) + (size_t)j0 * k_row, k_row, k_col, n_keys, BK, E, 1.0f);
        fetch(values, HEAD(v, head / shared) + (size_t)j0 * v_row, v_row, v_col, n_keys, BK, F, 1.0f);
        BARRIER;
        SLOPES(STORE_SLOPE)
        BARRIER;
        for (int j = 0; j < n_keys; j++) {
            float ds[ROWS];
            EACH(i, ROWS) ds[i] = slopes[QUERY(i) * (BK + 1) + j];
            EACH(c, E_COLS) if (IS_COLUMN(c, E)) {
                const float x = keys[j * (E + 1) + COLUMN(c)];
                EACH(i, ROWS) sums[i][c] += ds[i] * x;
            }
        }
        BARRIER;
    }
    __global float *target = HEAD(dq, head) + (size_t)i0 * dq_row;
    EACH(i, ROWS) EACH(c, E_COLS) if (QUERY(i) < n_queries && IS_COLUMN(c, E))
        target[(size_t)QUERY(i) * dq_row + (size_t)COLUMN(c) * dq_col] = sums[i][c] * scale;
}

KERNEL attention_keys(TENSOR(grad), TENSOR(q), TENSOR(k), TENSOR(v), TENSOR(out), TENSOR(lse), TENSOR_OUT(dk),
                      TENSOR_OUT(dv), const int H, const int shared, const int T, const int S, const float scale,
                      const int is_causal, STRIDES(grad), STRIDES(q), STRIDES(k), STRIDES(v), STRIDES(out),
                      const int lse_batch, const int lse_head, const int lse_row, STRIDES(dk),
                      STRIDES(dv) MASK_PARAMETERS DROPOUT_PARAMETERS)
{
    __local float queries[BQ * (E + 1)], grads[BQ * (F + 1)], keys[BK * (E + 1)], values[BK * (F + 1)];
    __local float slopes[BQ * (BK + 1)], weights[BQ * (BK + 1)], parts[BQ * GROUP_X];
    GROUP_OF(shared_head, H / shared, j0, S, BK)
    const int n_keys = at_most(S - j0, BK);
    fetch(keys, HEAD(k, shared_head) + (size_t)j0 * k_row, k_row, k_col, n_keys, BK, E, 1.0f);
    fetch(values, HEAD(v, shared_head) + (size_t)j0 * v_row, v_row, v_col, n_keys, BK, F, 1.0f);
    float key_sums[KEY_ROWS][E_COLS], value_sums[KEY_ROWS][F_COLS];
    EACH(r, KEY_ROWS) {
        EACH(c, E_COLS) key_sums[r][c] = 0.0f;
        EACH(c, F_COLS) value_sums[r][c] = 0.0f;
    }

    const int first_query = is_causal ? j0 / BQ * BQ : 0;  // earlier ones see none of these keys
    for (int head = shared_head * shared; head < (shared_head + 1) * shared; head++)
        for (int i0 = first_query; i0 < T; i0 += BQ) {
            const int n_queries = at_most(T - i0, BQ);
            fetch(queries, HEAD(q, head) + (size_t)i0 * q_row, q_row, q_col, n_queries, BQ, E, scale);
            fetch(grads, HEAD(grad, head) + (size_t)i0 * grad_row, grad_row, grad_col, n_queries, BQ, F, 1.0f);
            BARRIER;
            float delta[ROWS], shift[ROWS];
            deltas(delta, grads, HEAD(out, head) + (size_t)i0 * out_row, out_row, out_col, n_queries, parts);
            EACH(i, ROWS) shift[i] = QUERY(i) < n_queries ? HEAD(lse, head)[(size_t)(i0 + QUERY(i)) * lse_row] : 0.0f;
            SLOPES(weights[QUERY(i) * (BK + 1) + KEY(j)] = weight;)
            BARRIER;
            for (int i = 0; i < n_queries; i++) {
                float ds[KEY_ROWS], p[KEY_ROWS];
                EACH(r, KEY_ROWS) {
                    ds[r] = slopes[i * (BK + 1) + Y + r * GROUP_Y];
                    p[r] = weights[i * (BK + 1) + Y + r * GROUP_Y];
                }
                EACH(c, E_COLS) if (IS_COLUMN(c, E)) {
                    const float x = queries[i * (E + 1) + COLUMN(c)];
                    EACH(r, KEY_ROWS) key_sums[r][c] += ds[r] * x;
                }
                EACH(c, F_COLS) if (IS_COLUMN(c, F)) {
                    const float x = grads[i * (F + 1) + COLUMN(c)];
                    EACH(r, KEY_ROWS) value_sums[r][c] += p[r] * x;
                }
            }
            BARRIER;
        }
    EACH(r, KEY_ROWS) {
        const int key = Y + r * GROUP_Y;
        if (key >= n_keys) continue;
        EACH(c, E_COLS) if (IS_COLUMN(c, E))
            HEAD(dk, shared_head)[(size_t)(j0 + key) * dk_row + (size_t)COLUMN(c) * dk_col] = key_sums[r][c];
        EACH(c, F_COLS) if (IS_COLUMN(c, F))
            HEAD(dv, shared_head)[(size_t)(j0 + key) * dv_row + (size_t)COLUMN(c) * dv_col] = value_sums[r][c];
    }
}
#endif

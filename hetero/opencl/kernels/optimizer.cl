// Gradient clipping and the updates of Adam, AdamW and SGD over vectors that hold all parameters of a group.
//
//   zero_gaps:         x[first ... first + number - 1] = 0 for gap i, (first, number) = gaps[i]
//   accumulate:        x = keep * x + y; x may hold anything if keep is 0
//   square_sum:        partial[g] = sum of x^2 over chunk g of CHUNK elements
//   clip_factor:       norm = sqrt(sum of partial),  factor = min(1, largest / (norm + 1e-6))
//   adam:              g = sign * factor * grad + l2 * p;  p = p * decay
//                      m = m + (g - m) * take1;  v = v * keep2 + take2 * g^2
//                      p = p - step_size * m / (sqrt(v) * root + epsilon)
//   sgd:               g = sign * factor * grad + l2 * p
//                      b = keep * b + take * g;  p = p - lr * (nesterov ? g + momentum * b : b), without b: p - lr * g
//
//   p, grad, m, v, b (n): contiguous, each in a buffer of its own. partial: one a chunk. factor, norm: one element.
//   keep, take, step_size, ...: numbers of the step, computed by the host in double; the formulas: optimizers.py.
//
// Work-group: LOCAL work-items; zero_gaps, clip_factor: one. square_sum: one group a chunk; zero_gaps: one work-item a
// gap; clip_factor: one work-item; the others: work-item i does elements i * per_item ... (i + 1) * per_item - 1.
// Build constants: LANES (common.cl); LOCAL, a power of two, 1 on CPU-type devices.
// The order of all sums depends on n and LOCAL alone.
// Tolerance: norm n / LANES eps relative at worst; adam, sgd: 8 eps of the update and 1 of p, v is at most 3 eps off.
// Source: Loshchilov, Hutter, "Decoupled weight decay regularization", ICLR 2019, algorithm 2; Sutskever et al., "On the
// importance of initialization and momentum in deep learning", ICML 2013, in the form of torch.optim.SGD; the clipping of
// torch.nn.utils.clip_grad_norm_.

#define CHUNK 16384
#ifndef LOCAL
#define LOCAL 1
#endif
#define OPTIMIZER __kernel __attribute__((reqd_work_group_size(LOCAL, 1, 1))) void
#define VECTOR(x) __global float *restrict x##_buffer, const int x##_offset

__kernel void zero_gaps(TENSOR_OUT(x), TENSOR_INT64(gaps))
{
    const int first = BASE(gaps)[2 * get_global_id(0)], number = BASE(gaps)[2 * get_global_id(0) + 1];
    for (int i = first; i < first + number; i++) BASE(x)[i] = 0.0f;
}

OPTIMIZER accumulate(VECTOR(x), TENSOR(y), const int n, const int per_item, const float keep)
{
    const int first = get_global_id(0) * per_item, last = n - first < per_item ? n : first + per_item;
    __global float *restrict x = BASE(x);
    __global const float *restrict y = BASE(y);
    if (keep == 0.0f)
        for (int i = first; i < last; i++) x[i] = y[i];
    else
        for (int i = first; i < last; i++) x[i] = keep * x[i] + y[i];
}

OPTIMIZER square_sum(TENSOR(x), TENSOR_OUT(partial), const int n)
{
    const int first = get_group_id(0) * CHUNK, last = n - first < CHUNK ? n : first + CHUNK;
    __global const float *x = BASE(x);
#if LOCAL == 1
    vec s0 = 0.0f, s1 = 0.0f;
    int c = first;
    for (; c + 2 * LANES <= last; c += 2 * LANES) {
        const vec a = LOAD(x + c), b = LOAD(x + c + LANES);
        s0 += a * a;
        s1 += b * b;
    }
    float sum = sum_lanes(s0 + s1);
    for (; c < last; c++) sum += x[c] * x[c];
    BASE(partial)[get_group_id(0)] = sum;
#else
    __local float sums[LOCAL];
    const int item = get_local_id(0);
    float sum = 0.0f;
    for (int c = first + item; c < last; c += LOCAL) sum += x[c] * x[c];
    sums[item] = sum;
    for (int half_size = LOCAL / 2; half_size > 0; half_size /= 2) {
        barrier(CLK_LOCAL_MEM_FENCE);
        if (item < half_size) sums[item] += sums[item + half_size];
    }
    if (item == 0) BASE(partial)[get_group_id(0)] = sums[0];
#endif
}

__kernel void clip_factor(TENSOR(partial), TENSOR_OUT(factor), TENSOR_OUT(norm), const int n, const float largest)
{
    float sum = 0.0f, lost = 0.0f;  // Kahan's compensated sum: there may be thousands of chunks
    for (int i = 0; i < n; i++) {
        const float term = BASE(partial)[i] - lost, next = sum + term;
        lost = next - next == 0.0f ? (next - sum) - term : 0.0f;  // 0 once the sum is infinite or NaN
        sum = next;
    }
    const float root = SQRT(sum), ratio = largest / (root + 1e-6f);
    BASE(norm)[0] = root;
    BASE(factor)[0] = ratio > 1.0f ? 1.0f : ratio;
}

OPTIMIZER adam(VECTOR(p), VECTOR(grad), VECTOR(m), VECTOR(v), TENSOR(factor), const int n, const int per_item,
               const int is_clipped, const float sign, const float l2, const float decay, const float take1,
               const float keep2, const float take2, const float step_size, const float root, const float epsilon)
{
    const int first = get_global_id(0) * per_item, last = n - first < per_item ? n : first + per_item;
    const float scale = is_clipped ? sign * BASE(factor)[0] : sign;
    __global float *restrict p = BASE(p), *restrict m = BASE(m), *restrict v = BASE(v);
    __global const float *restrict grad = BASE(grad);
    for (int i = first; i < last; i++) {
        const float g = scale * grad[i] + l2 * p[i];
        const float m1 = m[i] + (g - m[i]) * take1;
        const float v1 = v[i] * keep2 + take2 * g * g;
        m[i] = m1;
        v[i] = v1;
        p[i] = p[i] * decay - step_size * m1 / (SQRT(v1) * root + epsilon);
    }
}

OPTIMIZER sgd(VECTOR(p), VECTOR(grad), VECTOR(b), TENSOR(factor), const int n, const int per_item, const int is_clipped,
              const int has_momentum, const int is_nesterov, const float sign, const float l2, const float lr,
              const float momentum, const float keep, const float take)
{
    const int first = get_global_id(0) * per_item, last = n - first < per_item ? n : first + per_item;
    const float scale = is_clipped ? sign * BASE(factor)[0] : sign;
    __global float *restrict p = BASE(p);
    __global const float *restrict grad = BASE(grad);
    if (!has_momentum) {
        for (int i = first; i < last; i++) p[i] -= lr * (scale * grad[i] + l2 * p[i]);
        return;
    }
    __global float *restrict b = BASE(b);
    const float ahead = is_nesterov ? 1.0f : 0.0f, behind = is_nesterov ? momentum : 1.0f;
    for (int i = first; i < last; i++) {
        const float g = scale * grad[i] + l2 * p[i];
        // keep is 0 at the first step, where b may hold anything
        const float b1 = (keep == 0.0f ? 0.0f : keep * b[i]) + take * g;
        b[i] = b1;
        p[i] -= lr * (ahead * g + behind * b1);
    }
}

#include "gated_residual.h"

namespace k5::K5_ISA {

template <class X, class Y>
void gated_residual(const GatedResidual<X, Y>& op, int64_t first_row, int64_t end_row) {
  const int64_t whole = op.width / kLanes * kLanes, rest = op.width - whole;
  Place place = place_of(op.sequences, first_row);
  for (int64_t row = first_row; row < end_row; row++, place = next(op.sequences, place)) {
    const X* x = op.x + row * op.width;
    const Y* y = op.y + row * op.width;
    X* out = op.out + row * op.width;
    const float* gate = row_at(op.gate, place);
    for (int64_t i = 0; i < whole; i += kLanes) store(out + i, load(x + i) + load(gate + i) * load(y + i));
    if (rest)
      store_partial(out + whole,
                    load_partial(x + whole, rest) + load_partial(gate + whole, rest) * load_partial(y + whole, rest),
                    rest);
  }
}

template void gated_residual(const GatedResidual<float, float>&, int64_t, int64_t);
template void gated_residual(const GatedResidual<float, BFloat16>&, int64_t, int64_t);
template void gated_residual(const GatedResidual<BFloat16, float>&, int64_t, int64_t);
template void gated_residual(const GatedResidual<BFloat16, BFloat16>&, int64_t, int64_t);

}  // namespace k5::K5_ISA

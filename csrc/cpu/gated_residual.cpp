#include "gated_residual.h"

#include "lanes.h"

namespace k5::K5_ISA {
namespace {

template <bool kPastCaches, class X, class Y>
void rows_forward(const GatedResidual<X, Y>& op, int64_t first_row, int64_t end_row) {
  Place place = place_of(op.sequences, first_row);
  for (int64_t row = first_row; row < end_row; row++, place = next(op.sequences, place)) {
    const X* x = op.x + row * op.width;
    const Y* y = op.y + row * op.width;
    X* out = op.out + row * op.width;
    const float* gate = row_at(op.gate, place);
    for_values(op.width, [&](int64_t i, auto lanes) {
      lanes.template set<kPastCaches>(out + i, lanes.get(x + i) + lanes.get(gate + i) * lanes.get(y + i));
    });
  }
  if (kPastCaches) end_of_stream();
}

template <bool kPastCaches, class X, class Y>
void pieces_backward(const GatedResidualBackward<X, Y>& op, const Piece* pieces, int64_t first_piece,
                     int64_t end_piece) {
  for (int64_t number = first_piece; number < end_piece; number++) {
    const Piece& piece = pieces[number];
    Place place = piece.place;
    for (int64_t row = piece.first_row; row < piece.end_row; row++, place = next(op.sequences, place)) {
      const X* grad = op.grad + row * op.width;
      const Y* y = op.y + row * op.width;
      Y* grad_y = op.grad_y + row * op.width;
      const float* gate = row_at(op.gate, place);
      const GradientRow grad_gate = gradient_row(op.grad_gate, piece, number, row, op.width);
      for_values(op.width, [&](int64_t i, auto lanes) {
        const auto gradient = lanes.get(grad + i);
        lanes.template set<kPastCaches>(grad_y + i, gradient * lanes.get(gate + i));
        grad_gate.add(i, lanes, gradient * lanes.get(y + i));
      });
    }
  }
  if (kPastCaches) end_of_stream();
}

}  // namespace

template <class X, class Y>
void gated_residual(const GatedResidual<X, Y>& op, int64_t first_row, int64_t end_row) {
  op.past_caches ? rows_forward<true>(op, first_row, end_row) : rows_forward<false>(op, first_row, end_row);
}

template <class X, class Y>
void gated_residual_backward(const GatedResidualBackward<X, Y>& op, const Piece* pieces, int64_t first_piece,
                             int64_t end_piece) {
  op.past_caches ? pieces_backward<true>(op, pieces, first_piece, end_piece)
                 : pieces_backward<false>(op, pieces, first_piece, end_piece);
}

#define K5_INSTANTIATE(X, Y)                                                  \
  template void gated_residual(const GatedResidual<X, Y>&, int64_t, int64_t); \
  template void gated_residual_backward(const GatedResidualBackward<X, Y>&, const Piece*, int64_t, int64_t);

K5_INSTANTIATE(float, float)
K5_INSTANTIATE(float, BFloat16)
K5_INSTANTIATE(BFloat16, float)
K5_INSTANTIATE(BFloat16, BFloat16)

}  // namespace k5::K5_ISA

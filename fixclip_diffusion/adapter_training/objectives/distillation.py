"""The base as a teacher of short captions: its noise predictions, and its text encoder's hidden states.

g is the base's own text encoder, f the one to adapt, A the adapter. Only captions that fit into g's 77 tokens count,
and the empty one. Shapes: R draws, L rows of the embeds, D width.
"""

from torch import Tensor

from fixclip_diffusion.adapter_training.objectives.step import Step, as_long, mean_square, mean_square_of_rows


class Prediction:
    """|UNet(x_t, t, A(f(short))) - UNet(x_t, t, g(short))|^2, the second without LoRA and without gradient."""

    name = "prediction"

    def __call__(self, step: Step) -> Tensor:
        rows = step.taught
        if not len(rows):
            return step.weight.new_zeros(())
        return (step.weight[rows] * mean_square(step.predicted[rows] - step.taught_predictions)).sum()


class States:
    """|A(f(short)) - g(short)|^2 over the rows of the embeds, where g has 77, and 0 is wanted of rows behind them."""

    name = "states"

    def __call__(self, step: Step) -> Tensor:
        rows = step.taught  # where there are none, the sum is 0 and still has a graph
        return mean_square_of_rows(
            step.embeds[rows].float() - as_long(step.teacher.float(), step.embeds.shape[1]), step.length[rows]
        ).sum()


class Windows:
    """|A(f(long)) - w(plain)|^2, where w is the hidden state of the same token by g, which reads the caption's plain
    wording (`Sample.plain`; the caption itself where there is none) in overlapping windows of 77. 0 is wanted of
    padding, nothing of tokens that the plain wording lacks. It needs no UNet, so that a run of it alone is a cheap
    start for the others."""

    name = "windows"

    def __call__(self, step: Step) -> Tensor:
        assert step.features.windows_known is not None
        rows = step.long_draws
        known_RL1 = step.features.windows_known[step.draws.sample[rows], :, None]
        known_RL = as_long(known_RL1, step.embeds.shape[1])[..., 0]
        return mean_square_of_rows(step.window_difference, step.length[rows], known_RL).sum()


class Plain:
    """sum of d_t |A(f(long))_t - w(plain)_t|^2 / sum of d_t over tokens t, where d_t = |w(long)_t - w(plain)_t|^2 / D.

    d_t is how far g itself is from the plain wording's states when it reads the caption as it stands, window by window.
    So this is about the tokens that windows misread, such as those of a sentence that points to another one, which are
    few among all that `Windows` averages over. 0 for captions without a plain wording."""

    name = "plain"

    def __call__(self, step: Step) -> Tensor:
        assert step.features.windows_gap is not None
        gap_RL1 = step.features.windows_gap[step.draws.sample[step.long_draws], :, None].float()
        gap_RL = as_long(gap_RL1, step.embeds.shape[1])[..., 0]
        error_RL = step.window_difference.square().mean(-1)
        total_R = gap_RL.sum(1)
        return ((gap_RL * error_RL).sum(1) / total_R.masked_fill(total_R == 0, 1)).sum()

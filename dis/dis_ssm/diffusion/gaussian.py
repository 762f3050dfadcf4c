"""The Gaussian diffusion process: schedules, targets, reverse distributions, losses, the bound.

Letters: T steps, t = 0 … T-1; a_t = ᾱ_t the cumulative product of 1 - β; s < t the step after t
when sampling, s = -1 being clean data (a_{-1} = 1); x0 data, x_t noisy data, ε noise, (B, C, ...).

Every formula is written for a general pair (t, s): a respaced chain is the original chain visited
at fewer steps, its β is 1 - a_t / a_s, and no second table exists. Coefficients are computed in
float64 and cast to the data's precision where they meet it.

Models are plain callables `model(x, t, y)`, always of three arguments: x (B, C, ...), t (B,) int64,
y (B,), (B, cond_dim), a Condition or None. They return C channels, or 2C with a learned variance:
the prediction, then the variance.
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from dis_ssm.condition import Conditioning
from dis_ssm.diffusion.likelihood import (
    VariationalBound,
    discretized_gaussian_log_likelihood,
    normal_kl,
    strata,
)
from dis_ssm.diffusion.process import (
    Generators,
    Model,
    check_inputs,
    draw,
    tensor_of,
    working_dtype,
)
from dis_ssm.diffusion.schedules import LINEAR_STEPS, SCHEDULES

PREDICTIONS = ("epsilon", "x0", "v", "score")


class Reverse(NamedTuple):
    """p(x_s | x_t) = N(mean, exp(log_variance)) and the x0 and ε behind it; all (B, C, ...)."""

    mean: Tensor
    log_variance: Tensor
    x0: Tensor
    epsilon: Tensor


@dataclass(eq=False)
class Diffusion:
    """The process q(x_t | x0) = N(√a_t x0, (1 - a_t) I) and what a model is trained to predict.

    Args:
        schedule: "linear", "cosine" or a 1-D tensor of β_t in (0, 1), whose length is then T.
        num_steps: T.
        prediction: what the model returns: "epsilon" ε, "x0", "v" = √a_t ε - √(1 - a_t) x0
            (Salimans & Ho 2022) or "score" = ∇ log q(x_t | x0) = -ε / √(1 - a_t).
        learn_sigma: the model returns 2C channels, the second half interpolating the log variance.
        variance: "fixed_small" (β̃_t) or "fixed_large" (β_t); counts when `learn_sigma` is False.
        loss_weighting: what multiplies the plain MSE, which is in units of the target (a score's is
            thus 1 / (1 - a_t) times that of the noise); see `loss_weight`.

    Raises:
        ValueError: an option or β out of its range.
    """

    schedule: str | Tensor = "linear"
    num_steps: int = LINEAR_STEPS
    prediction: str = "epsilon"
    learn_sigma: bool = True
    variance: str = "fixed_large"
    loss_weighting: str = "none"
    betas: Tensor = field(init=False, repr=False)
    alpha_bar: Tensor = field(init=False, repr=False)

    def __post_init__(self):
        _check_choice("prediction", self.prediction, PREDICTIONS)
        _check_choice("variance", self.variance, ("fixed_small", "fixed_large"))
        _check_choice("loss_weighting", self.loss_weighting, ("none", "epsilon", "elbo"))
        if isinstance(self.schedule, Tensor):
            self.betas = self.schedule.detach().to("cpu", torch.float64)
            if self.betas.ndim != 1 or not len(self.betas):
                raise ValueError(f"betas must be a 1-D tensor, got shape {tuple(self.betas.shape)}")
            self.num_steps = len(self.betas)
        else:
            _check_choice("schedule", self.schedule, tuple(SCHEDULES))
            if self.num_steps < 1:
                raise ValueError(f"num_steps must be at least 1, got {self.num_steps}")
            self.betas = SCHEDULES[self.schedule](self.num_steps)
        if not ((self.betas > 0) & (self.betas < 1)).all():
            low, high = self.betas.min().item(), self.betas.max().item()
            raise ValueError(f"betas must lie strictly between 0 and 1, got {low:g} to {high:g}")
        self.alpha_bar = (1 - self.betas).cumprod(0)
        first = self.betas[0].item()
        if self.num_steps > 1:  # β̃ of the step 1 → 0
            first = (self.betas[1] * (1 - self.alpha_bar[0]) / (1 - self.alpha_bar[1])).item()
        self._first_log_variance = math.log(first)
        self._tables = {}  # device -> a_{-1}, a_0 … a_{T-1} there

    # -- coefficients, float64 (B,) --------------------------------------------------------------

    def _alpha_bars(self, t: Tensor, s: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """a_t, a_s (s defaults to t - 1) and s."""
        t = t.long()
        s = t - 1 if s is None else s.long()
        if t.device.type == "mps":  # has no float64
            t, s = t.cpu(), s.cpu()
        if t.device not in self._tables:
            table = torch.cat([torch.ones_like(self.alpha_bar[:1]), self.alpha_bar])
            self._tables[t.device] = table.to(t.device)
        table = self._tables[t.device]
        return table[1:].gather(0, t), table.gather(0, s + 1), s

    def _log_variances(self, t: Tensor, s: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """log β̃ and log β of the step t → s. β̃ is 0 at s = -1: there it is that of the step 1 → 0
        (Nichol & Dhariwal 2021)."""
        a_t, a_s, s = self._alpha_bars(t, s)
        beta = 1 - a_t / a_s
        posterior = (beta * (1 - a_s) / (1 - a_t)).log()
        return posterior.masked_fill(s < 0, self._first_log_variance), beta.log()

    def _fixed_log_variance(self, t: Tensor, s: Tensor | None = None) -> Tensor:
        """log σ² of the fixed `variance`; "fixed_small" where the variance is learned (in the loss
        weight) and at the last step, to s = -1."""
        small, large = self._log_variances(t, s)
        if self.learn_sigma or self.variance == "fixed_small":
            return small
        return torch.where(self._alpha_bars(t, s)[2] < 0, small, large)

    def _posterior_weights(self, t: Tensor, s: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What multiplies x0 and x_t in the mean of `q_posterior`."""
        a_t, a_s, _ = self._alpha_bars(t, s)
        return a_s.sqrt() * (1 - a_t / a_s) / (1 - a_t), (a_t / a_s).sqrt() * (1 - a_s) / (1 - a_t)

    # -- the process -----------------------------------------------------------------------------

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t = √a_t x0 + √(1 - a_t) noise (Ho et al. 2020, eq. 4); t (B,) integer in [0, T).

        Raises:
            ValueError: t is not one integer in [0, T) per image, or noise has not x0's shape.
        """
        self._check(x0, t)
        if noise.shape != x0.shape:
            shapes = f"{tuple(x0.shape)}, got {tuple(noise.shape)}"
            raise ValueError(f"noise must have the shape of x0, {shapes}")
        a, _, _ = self._alpha_bars(t)
        return _broadcast(a.sqrt(), x0) * x0 + _broadcast((1 - a).sqrt(), x0) * noise

    def q_posterior(
        self, x0: Tensor, x_t: Tensor, t: Tensor, s: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean (B, C, ...), variance and log variance (B, 1, ...) of q(x_s | x_t, x0), s = t - 1 by
        default (Ho et al. 2020, eq. 7, for any pair s < t):

            mean = √a_s β/(1 - a_t) x0 + √(a_t/a_s) (1 - a_s)/(1 - a_t) x_t,  β = 1 - a_t/a_s,
            variance = β̃ = β (1 - a_s)/(1 - a_t).

        The variance at s = -1 is 0 and its log that of the step 1 → 0.
        """
        on_x0, on_x_t = self._posterior_weights(t, s)
        a_t, a_s, _ = self._alpha_bars(t, s)
        variance = (1 - a_t / a_s) * (1 - a_s) / (1 - a_t)
        log_variance, _ = self._log_variances(t, s)
        mean = _broadcast(on_x0, x_t) * x0 + _broadcast(on_x_t, x_t) * x_t
        return mean, _broadcast(variance, x_t), _broadcast(log_variance, x_t)

    def predict(
        self, output: Tensor, x_t: Tensor, t: Tensor, prediction: str | None = None
    ) -> tuple[Tensor, Tensor]:
        """(x0, ε) from a prediction (B, C, ...) of the given kind (the object's own by default).

        x_t = √a_t x0 + √(1 - a_t) ε is solved for what the prediction does not say; v gives
        x0 = √a_t x_t - √(1 - a_t) v and ε = √(1 - a_t) x_t + √a_t v.

        Raises:
            ValueError: an unknown kind.
        """
        a, _, _ = self._alpha_bars(t)
        signal, sigma = _broadcast(a.sqrt(), x_t), _broadcast((1 - a).sqrt(), x_t)
        match prediction or self.prediction:
            case "epsilon":
                return (x_t - sigma * output) / signal, output
            case "x0":
                return output, (x_t - signal * output) / sigma
            case "v":
                return signal * x_t - sigma * output, sigma * x_t + signal * output
            case "score":
                return (x_t + sigma.square() * output) / signal, -sigma * output
            case unknown:
                raise _not_among("prediction", unknown, PREDICTIONS)

    def target(self, x0: Tensor, noise: Tensor, t: Tensor, prediction: str | None = None) -> Tensor:
        """What a model of the given kind should return for (x0, noise) at t; so
        `target(*predict(output, x_t, t, p), t, q)` converts a prediction from kind p to kind q.

        Raises:
            ValueError: an unknown kind.
        """
        a, _, _ = self._alpha_bars(t)
        signal, sigma = _broadcast(a.sqrt(), x0), _broadcast((1 - a).sqrt(), x0)
        match prediction or self.prediction:
            case "epsilon":
                return noise
            case "x0":
                return x0
            case "v":
                return signal * noise - sigma * x0
            case "score":
                return -noise / sigma
            case unknown:
                raise _not_among("prediction", unknown, PREDICTIONS)

    def split(self, output: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """A model's output as (prediction, variance interpolation or None), at least float32.

        Raises:
            ValueError: it is no tensor (see `tensor_of`), or its shape is not that of x with 2C
                (learned variance) or C channels.
        """
        output, channels = tensor_of(output), x.shape[1]
        wanted = channels * (1 + self.learn_sigma)
        if output.shape != (x.shape[0], wanted, *x.shape[2:]):
            raise ValueError(
                f"the model returned shape {tuple(output.shape)} for x of shape {tuple(x.shape)}; "
                f"Diffusion(learn_sigma={self.learn_sigma}) needs {wanted} channels. "
                "Give the model and the Diffusion the same learn_sigma."
            )
        output = output.to(working_dtype(output))
        return output.split(channels, 1) if self.learn_sigma else (output, None)

    def reverse(
        self,
        output: Tensor,
        x_t: Tensor,
        t: Tensor,
        s: Tensor | None = None,
        clip_denoised: bool = False,
    ) -> Reverse:
        """p(x_s | x_t) of a model output (B, C or 2C, ...); s = t - 1 by default.

        The mean is the posterior's at the predicted x0, clipped to [-1, 1] on request. A learned
        variance is log σ² = f log β + (1 - f) log β̃, f = (output + 1) / 2, with the β and β̃ of the
        pair (Nichol & Dhariwal 2021, eq. 15).
        """
        prediction, interpolation = self.split(output, x_t)
        x0, epsilon = self.predict(prediction, x_t, t)
        if clip_denoised:
            x0 = x0.clamp(-1, 1)
            epsilon = self.predict(x0, x_t, t, "x0")[1]
        mean, _, _ = self.q_posterior(x0, x_t, t, s)
        if interpolation is None:
            log_variance = _broadcast(self._fixed_log_variance(t, s), x_t).expand_as(mean)
        else:
            small, large = (_broadcast(bound, x_t) for bound in self._log_variances(t, s))
            fraction = (interpolation + 1) / 2
            log_variance = fraction * large + (1 - fraction) * small
        return Reverse(mean, log_variance, x0, epsilon)

    # -- times -----------------------------------------------------------------------------------

    def draw_times(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """int64 (n,), uniform in [0, T), on the generator's device (the CPU when it is None)."""
        device = "cpu" if generator is None else generator.device
        return torch.randint(self.num_steps, (n,), generator=generator, device=device)

    def bin_times(self, t: Tensor, bins: int) -> Tensor:
        """⌊t · bins / T⌋, int64 like t, in [0, bins)."""
        return t * bins // self.num_steps

    # -- losses ----------------------------------------------------------------------------------

    def loss_weight(self, t: Tensor) -> Tensor:
        """w_t (B,) float64 in loss = w_t · mse, mse in units of the target.

        "none": 1. "epsilon": the weight that turns the target's MSE into that of the noise, hence
        DDPM's L_simple for every target: ε 1, x0 a_t/(1 - a_t), v a_t, score 1 - a_t.
        "elbo": the weight that turns it into the KL of the means in bits per dimension (Ho et al.
        2020, eq. 12), the same for every target: c²/(2 σ² ln 2) on the MSE of x0, c the posterior's
        weight on x0, σ² the fixed variance (β̃_t when the variance is learned).
        """
        a, _, _ = self._alpha_bars(t)
        if self.loss_weighting == "none":
            return torch.ones_like(a)
        to_epsilon = {"epsilon": 1, "x0": a / (1 - a), "v": a, "score": 1 - a}[self.prediction]
        if self.loss_weighting == "epsilon":
            return to_epsilon * torch.ones_like(a)
        on_x0, _ = self._posterior_weights(t)
        precision = (-self._fixed_log_variance(t)).exp()
        return to_epsilon * (1 - a) / a * on_x0.square() * precision / (2 * math.log(2))

    def vb_term(self, x0: Tensor, x_t: Tensor, t: Tensor, reverse: Reverse) -> Tensor:
        """L_{t-1} = KL(q(x_{t-1} | x_t, x0) ‖ p), or at t = 0 L_0 = -log p(x0 | x_0) under the
        discretised Gaussian, in bits per dimension (B,)."""
        mean, _, log_variance = self.q_posterior(x0, x_t, t)
        kl = normal_kl(mean, log_variance, reverse.mean, reverse.log_variance)
        nll = -discretized_gaussian_log_likelihood(x0, reverse.mean, reverse.log_variance)
        return torch.where(t == 0, _image_mean(nll), _image_mean(kl)) / math.log(2)

    def training_losses(
        self,
        model: Model,
        x0: Tensor,
        t: Tensor,
        y: Conditioning = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The loss of each image at its timestep, a dictionary of (B,) tensors.

        mse: mean squared error of the prediction, in units of the target; vb (only with a learned
        variance): the term of the bound at t in bits per dimension, its mean detached so that it
        trains the variance alone (Nichol & Dhariwal 2021, §3.1); loss = loss_weight(t) · mse + vb.

        Args:
            model: called once, in x0's dtype; the losses are float32 (float64 for float64 x0).
            x0: (B, C, ...), data in [-1, 1] for L_0 to be a likelihood of 256-level images.
            t: (B,) integer in [0, T). The range is checked here on a CPU, by the gather elsewhere.
            noise: like x0; drawn when None.

        Raises:
            ValueError: x0 is not floating point; t, y or noise does not fit it; or the model's
                output has the wrong shape (see `split`).
        """
        self._check(x0, t, y)
        if noise is None:
            noise = torch.randn_like(x0)
        elif noise.shape != x0.shape:
            raise ValueError(f"noise {tuple(noise.shape)} and x0 {tuple(x0.shape)} differ in shape")
        dtype, x0, noise = x0.dtype, x0.to(working_dtype(x0)), noise.to(working_dtype(x0))
        x_t = self.q_sample(x0, t, noise)
        output = model(x_t.to(dtype), t.long(), y)
        prediction, interpolation = self.split(output, x0)
        mse = _image_mean((self.target(x0, noise, t) - prediction).square())
        weighted = _broadcast(self.loss_weight(t), mse) * mse
        if interpolation is None:
            return {"loss": weighted, "mse": mse}
        frozen = torch.cat([prediction.detach(), interpolation], 1)
        vb = self.vb_term(x0, x_t, t, self.reverse(frozen, x_t, t))
        return {"loss": weighted + vb, "mse": mse, "vb": vb}

    # -- the bound -------------------------------------------------------------------------------

    def prior_term(self, x0: Tensor) -> Tensor:
        """L_T = KL(q(x_{T-1} | x0) ‖ N(0, I)) in bits per dimension (B,)."""
        a = self.alpha_bar[-1].item()
        log_variance = torch.tensor(math.log1p(-a), dtype=x0.dtype, device=x0.device)
        zero = torch.zeros_like(log_variance)
        return _image_mean(normal_kl(math.sqrt(a) * x0, log_variance, zero, zero)) / math.log(2)

    @torch.no_grad()
    def variational_bound(
        self,
        model: Model,
        x0: Tensor,
        y: Conditioning = None,
        *,
        num_terms: int | None = None,
        generator: Generators = None,
        clip_denoised: bool = False,
    ) -> VariationalBound:
        """The bound on -log p(x0) in bits per dimension, x0 (B, C, ...) of 256 levels in [-1, 1].

        Whole (`num_terms` None): one pass per timestep, T in all. Estimated: L_T and L_0 are always
        computed, and the sum of the T - 1 others comes from `num_terms` passes, two timesteps drawn
        in each of num_terms/2 strata for every image: the estimate is unbiased, and so is the
        square of its standard error. Strata are narrow at small t, where the terms change most.

        Args:
            generator: of the noise and the timesteps; one, or a list, one per image.
            clip_denoised: clip the predicted x0 to [-1, 1] before it enters the means.

        Raises:
            ValueError: num_terms is not even or asks for more strata than there are terms.
        """
        batch, dtype, device = x0.shape[0], x0.dtype, x0.device
        self._check(x0, torch.zeros(batch, dtype=torch.int64), y)
        x0 = x0.to(working_dtype(x0))
        if num_terms is None:
            timesteps = torch.arange(1, self.num_steps, device=device)[:, None].expand(-1, batch)
        else:
            timesteps, sizes = self._draw_bound_times(num_terms, batch, generator, device)

        def term(t: Tensor) -> Tensor:
            x_t = self.q_sample(x0, t, draw(torch.randn, x0.shape, generator, device, x0.dtype))
            output = model(x_t.to(dtype), t, y)
            return self.vb_term(x0, x_t, t, self.reverse(output, x_t, t, None, clip_denoised))

        decoder = term(torch.zeros(batch, dtype=torch.int64, device=device))
        prior = self.prior_term(x0)
        terms = (
            torch.stack([term(t) for t in timesteps]) if len(timesteps) else x0.new_zeros(0, batch)
        )
        if num_terms is None:
            middle, error = terms.sum(0), torch.zeros_like(prior)
        else:  # each stratum's size times the mean of its two terms; their difference is the error
            pairs = (sizes.to(terms) * terms / 2).unflatten(0, (-1, 2))
            middle = pairs.sum((0, 1))
            error = (pairs[:, 0] - pairs[:, 1]).square().sum(0).sqrt()
        return VariationalBound(prior + middle + decoder, prior, decoder, timesteps, terms, error)

    def _draw_bound_times(
        self, num_terms: int, batch: int, generator: Generators, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Timesteps (num_terms, B), two in a row from each stratum, and the strata's sizes
        (num_terms, 1)."""
        total = self.num_steps - 1
        if num_terms < 2 or num_terms % 2 or num_terms // 2 > total:
            raise ValueError(
                f"num_terms must be even and in [2, {2 * total}] for {self.num_steps} steps, got "
                f"{num_terms}; None evaluates every term"
            )
        edges = strata(total, num_terms // 2).to(device).repeat_interleave(2, 0)
        sizes = (edges[:, 1] - edges[:, 0])[:, None]
        uniform = draw(torch.rand, (batch, num_terms), generator, device, torch.float32).T
        return edges[:, :1] + (uniform * sizes).long().clamp(max=sizes - 1), sizes

    def _check(self, x: Tensor, t: Tensor, y: Conditioning = None):
        if t.dtype.is_floating_point or t.dtype.is_complex or t.dtype == torch.bool:
            raise ValueError(f"t must be an integer tensor, got {t.dtype}; use t.long()")
        if t.shape != (x.shape[0],):
            raise ValueError(
                f"t must have shape ({x.shape[0]},), one per image, got {tuple(t.shape)}"
            )
        if t.device.type == "cpu" and len(t) and not (0 <= t.min() and t.max() < self.num_steps):
            raise ValueError(
                f"t must lie in [0, {self.num_steps - 1}], got {t.min().item()} … {t.max().item()}"
            )
        check_inputs(x, y)


def _broadcast(coefficient: Tensor, x: Tensor) -> Tensor:
    """A (B,) coefficient on x's device in its working precision, broadcast over the rest of x."""
    shape = (-1, *[1] * (x.ndim - 1))
    return coefficient.to(working_dtype(x)).to(x.device).reshape(shape)


def _image_mean(x: Tensor) -> Tensor:
    return x.flatten(1).mean(1)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise _not_among(name, value, choices)


def _not_among(name: str, value: str, choices: tuple[str, ...]) -> ValueError:
    return ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")

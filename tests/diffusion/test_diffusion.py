"""The diffusion process against closed forms, in float64 where it matters.

Data N(MU, SCALE²) have an exact denoiser, so the whole chain and its bound are known on paper.
"""

import itertools
import math

import numpy as np
import pytest
import torch

from dis_ssm.diffusion.gaussian import PREDICTIONS, Diffusion, Reverse
from dis_ssm.diffusion.likelihood import discretized_gaussian_log_likelihood, normal_kl
from helpers import MU, SCALE, GaussianDenoiser


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)  # these tensors are too small for two


def _batch(*shape, dtype=torch.float64, seed=1):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=dtype) for _ in range(3)]


# -- schedules ---------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1000, 250, 100])
def test_linear_table_is_the_running_product(steps):
    betas = np.linspace(0.1 / steps, 20 / steps, steps)
    product, expected = 1.0, []
    for beta in betas:
        product *= 1 - beta
        expected.append(product)
    d = Diffusion("linear", steps)
    assert d.alpha_bar.dtype == torch.float64
    np.testing.assert_allclose(d.alpha_bar, expected, rtol=1e-12)
    assert -11 < d.alpha_bar[-1].log() < -10  # whatever T


def test_cosine_table_follows_the_cosine_until_beta_is_clipped():
    steps = 1000
    d = Diffusion("cosine", steps)
    angle = (np.arange(1, steps + 1) / steps + 0.008) / 1.008 * np.pi / 2
    expected = np.cos(angle) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(d.alpha_bar[:-1], expected[:-1], rtol=1e-9)
    assert d.betas[-1] == 0.999 and (d.betas[:-1] < 0.999).all()


def test_short_linear_schedules_stay_valid():
    assert Diffusion("linear", 5).betas.max() == 0.999
    assert len(Diffusion("linear", 1).betas) == 1


def test_custom_betas():
    d = Diffusion(torch.tensor([0.1, 0.5, 0.2], dtype=torch.float64))
    assert d.num_steps == 3
    np.testing.assert_allclose(d.alpha_bar, [0.9, 0.45, 0.36], rtol=1e-15)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"schedule": "sigmoid"}, "linear, cosine, got 'sigmoid'"),
        ({"schedule": torch.tensor([0.1, 1.0])}, "got 0.1 to 1"),
        ({"schedule": torch.ones(2, 2)}, r"shape \(2, 2\)"),
        ({"num_steps": 0}, "got 0"),
        ({"prediction": "noise"}, "got 'noise'"),
        ({"variance": "learned"}, "got 'learned'"),
        ({"loss_weighting": "snr"}, "got 'snr'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Diffusion(**options)


# -- forward process and posterior -------------------------------------------------------------


def test_q_sample_and_its_precision():
    d = Diffusion()
    x0, noise, _ = _batch(4, 2, 3, 5)
    t = torch.tensor([0, 1, 500, 999])
    a = d.alpha_bar[t].reshape(4, 1, 1, 1)
    expected = a.sqrt() * x0 + (1 - a).sqrt() * noise
    torch.testing.assert_close(d.q_sample(x0, t, noise), expected, rtol=1e-14, atol=0)
    single = d.q_sample(x0.float(), t.int(), noise.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("t, s", [(999, 998), (500, 499), (1, 0), (999, 750), (40, 3), (600, 0)])
def test_posterior_is_bayes_rule(schedule, t, s):
    """N(x_s; √a_s x0, 1 - a_s) · N(x_t; √(a_t/a_s) x_s, 1 - a_t/a_s), normalised by hand."""
    d = Diffusion(schedule)
    x0, x_t, _ = _batch(1, 2, 3, 3)
    a_t, a_s = d.alpha_bar[t].item(), d.alpha_bar[s].item()
    ratio = math.prod((1 - d.betas[s + 1 : t + 1]).tolist())  # α's between s and t, not a_t / a_s
    precision = 1 / (1 - a_s) + ratio / (1 - ratio)
    mean = (math.sqrt(a_s) * x0 / (1 - a_s) + math.sqrt(ratio) * x_t / (1 - ratio)) / precision
    assert ratio == pytest.approx(a_t / a_s)
    got = d.q_posterior(x0, x_t, torch.tensor([t]), torch.tensor([s]))
    torch.testing.assert_close(got[0], mean, rtol=1e-9, atol=1e-12)
    assert got[1].item() == pytest.approx(1 / precision, rel=1e-9)
    assert got[2].item() == pytest.approx(-math.log(precision), rel=1e-9)
    if s == t - 1:
        for default, explicit in zip(d.q_posterior(x0, x_t, torch.tensor([t])), got, strict=True):
            torch.testing.assert_close(default, explicit)


@pytest.mark.parametrize("t", [0, 17])
def test_posterior_of_clean_data_is_x0_with_the_clipped_log_variance(t):
    d = Diffusion()
    x0, x_t, _ = _batch(1, 1, 2, 2)
    mean, variance, log_variance = d.q_posterior(x0, x_t, torch.tensor([t]), torch.tensor([-1]))
    torch.testing.assert_close(mean, x0)
    assert variance.item() == 0
    _, _, following = d.q_posterior(x0, x_t, torch.tensor([1]))
    torch.testing.assert_close(log_variance, following)


# -- predictions -------------------------------------------------------------------------------


@pytest.mark.parametrize("source", PREDICTIONS)
@pytest.mark.parametrize("to", PREDICTIONS)
def test_predictions_convert_exactly(source, to):
    d = Diffusion("cosine", 50)
    x0, noise, _ = _batch(4, 2, 3, 3)
    t = torch.tensor([0, 10, 30, 47])
    x_t = d.q_sample(x0, t, noise)
    output = d.target(x0, noise, t, source)
    converted = d.target(*d.predict(output, x_t, t, source), t, to)
    torch.testing.assert_close(converted, d.target(x0, noise, t, to), rtol=1e-8, atol=1e-9)
    back = d.target(*d.predict(converted, x_t, t, to), t, source)
    torch.testing.assert_close(back, output, rtol=1e-8, atol=1e-9)


def test_targets_are_their_definitions():
    d = Diffusion()
    x0, noise, _ = _batch(3, 1, 2, 2)
    t = torch.tensor([5, 400, 990])
    a = d.alpha_bar[t].reshape(3, 1, 1, 1)
    v = a.sqrt() * noise - (1 - a).sqrt() * x0
    torch.testing.assert_close(d.target(x0, noise, t, "v"), v)
    x_t = d.q_sample(x0, t, noise).requires_grad_()
    log_density = -((x_t - a.sqrt() * x0).square() / (1 - a)).sum() / 2
    (score,) = torch.autograd.grad(log_density, x_t)
    torch.testing.assert_close(d.target(x0, noise, t, "score"), score)
    with pytest.raises(ValueError, match="got 'flow'"):
        d.target(x0, noise, t, "flow")


def test_learned_range_interpolates_the_log_variances_of_the_pair():
    d = Diffusion("linear", 100)
    x_t, output, _ = _batch(3, 2, 2, 2)
    t, s = torch.tensor([99, 50, 20]), torch.tensor([90, 49, 0])
    ratio = d.alpha_bar[t] / d.alpha_bar[s]
    beta = (1 - ratio).reshape(3, 1, 1, 1)
    posterior = beta * ((1 - d.alpha_bar[s]) / (1 - d.alpha_bar[t])).reshape(3, 1, 1, 1)
    for value, expected in [(-1.0, posterior), (1.0, beta), (0.0, (beta * posterior).sqrt())]:
        both = torch.cat([output, torch.full_like(output, value)], 1)
        p = d.reverse(both, x_t, t, s)
        torch.testing.assert_close(p.log_variance.exp(), expected.expand_as(x_t))
        torch.testing.assert_close(p.mean, d.q_posterior(p.x0, x_t, t, s)[0])


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_fixed_variances(variance):
    d = Diffusion("linear", 100, learn_sigma=False, variance=variance)
    x_t, output, _ = _batch(2, 2, 2, 2)
    p = d.reverse(output, x_t, torch.tensor([60, 0]))
    small = d.betas[60] * (1 - d.alpha_bar[59]) / (1 - d.alpha_bar[60])
    first = d.betas[1] * (1 - d.alpha_bar[0]) / (1 - d.alpha_bar[1])
    expected = small if variance == "fixed_small" else d.betas[60]
    assert p.log_variance[0].exp().unique().item() == pytest.approx(expected.item(), rel=1e-10)
    assert p.log_variance[1].exp().unique().item() == pytest.approx(first.item(), rel=1e-10)


def test_clipping_keeps_x0_and_epsilon_consistent():
    d = Diffusion("linear", 100, prediction="v", learn_sigma=False)
    x_t, output, _ = _batch(2, 2, 4, 4)
    t = torch.tensor([30, 80])
    p = d.reverse(3 * output, x_t, t, clip_denoised=True)
    assert p.x0.abs().max() == 1
    torch.testing.assert_close(d.q_sample(p.x0, t, p.epsilon), x_t)


# -- likelihoods -------------------------------------------------------------------------------


@pytest.mark.parametrize("mean, sigma", [(0.0, 0.3), (0.97, 0.01), (-1.4, 0.05), (0.2, 3.0)])
def test_discretized_likelihood_sums_to_one_and_is_the_cdf_difference(mean, sigma):
    x = torch.linspace(-1, 1, 256, dtype=torch.float64)
    m, v = torch.full_like(x, mean), torch.full_like(x, 2 * math.log(sigma))
    log_p = discretized_gaussian_log_likelihood(x, m, v)
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-12)

    def cdf(value):
        return (1 + math.erf((value - mean) / sigma / math.sqrt(2))) / 2

    edges = [0.0, *(cdf(-1 + (2 * k + 1) / 255) for k in range(255)), 1.0]
    np.testing.assert_allclose(log_p.exp(), np.diff(edges), atol=1e-14)


def test_discretized_likelihood_does_not_underflow_and_is_differentiable():
    x = torch.tensor([-1.0, -0.2, 0.5, 1.0])
    mean = torch.tensor([0.9, 0.9, -0.9, -0.9])
    log_variance = torch.full_like(x, 2 * math.log(5e-3)).requires_grad_()
    log_p = discretized_gaussian_log_likelihood(x, mean, log_variance)
    nearest = (x - mean).abs() - 1 / 255  # the edge of the bin on the mean's side dominates
    torch.testing.assert_close(log_p, -((nearest / 5e-3) ** 2) / 2, rtol=1e-2, atol=0)
    log_p.sum().backward()
    assert log_variance.grad.isfinite().all() and (log_variance.grad > 0).all()


def test_normal_kl_against_quadrature():
    mean1, var1, mean2, var2 = 0.3, 0.5, -0.2, 1.7
    x = torch.linspace(-15, 15, 200001, dtype=torch.float64)
    log_p = -((x - mean1) ** 2) / var1 / 2 - math.log(2 * math.pi * var1) / 2
    log_q = -((x - mean2) ** 2) / var2 / 2 - math.log(2 * math.pi * var2) / 2
    expected = torch.trapezoid(log_p.exp() * (log_p - log_q), x).item()
    values = [torch.tensor(v, dtype=torch.float64) for v in (mean1, math.log(var1), mean2)]
    got = normal_kl(*values, torch.tensor(math.log(var2), dtype=torch.float64))
    assert got.item() == pytest.approx(expected, rel=1e-8)


# -- losses ------------------------------------------------------------------------------------


def _constant_model(output):
    return lambda x, t, y: output


def test_vb_term_is_the_direct_formula():
    d = Diffusion("linear", 100)
    levels = torch.Generator().manual_seed(0)
    x0 = torch.randint(256, (3, 2, 4, 4), generator=levels).double() / 127.5 - 1
    noise, output, interpolation = _batch(3, 2, 4, 4)
    t = torch.tensor([0, 1, 70])
    model = _constant_model(torch.cat([output, interpolation], 1))
    losses = d.training_losses(model, x0, t, noise=noise)

    expected = []
    for i, step in enumerate(t.tolist()):
        a, beta = d.alpha_bar[step].item(), d.betas[step].item()
        before = d.alpha_bar[step - 1].item() if step else 1.0
        after = d.alpha_bar[step + 1].item()
        x_t = math.sqrt(a) * x0[i] + math.sqrt(1 - a) * noise[i]
        mean = (x_t - beta / math.sqrt(1 - a) * output[i]) / math.sqrt(1 - beta)  # Ho eq. 11
        small = beta * (1 - before) / (1 - a) if step else d.betas[1] * (1 - a) / (1 - after)
        f = (interpolation[i] + 1) / 2
        variance = (f * math.log(beta) + (1 - f) * math.log(small)).exp()
        if step:
            true = math.sqrt(before) * beta * x0[i] + math.sqrt(1 - beta) * (1 - before) * x_t
            gap = (true / (1 - a) - mean).square()
            nats = (variance.log() - math.log(small) + (small + gap) / variance - 1) / 2
        else:
            nats = -discretized_gaussian_log_likelihood(x0[i], mean, variance.log())
        expected.append(nats.mean().item() / math.log(2))
    np.testing.assert_allclose(losses["vb"], expected, rtol=1e-8)
    np.testing.assert_allclose(losses["mse"], (noise - output).square().mean((1, 2, 3)), rtol=1e-12)
    torch.testing.assert_close(losses["loss"], losses["mse"] + losses["vb"])


def test_vb_trains_the_variance_alone():
    d = Diffusion()
    x0, noise, output = _batch(2, 1, 4, 4)
    output = torch.cat([output, torch.zeros_like(output)], 1).requires_grad_()
    losses = d.training_losses(_constant_model(output), x0, torch.tensor([0, 600]), noise=noise)
    (grad,) = torch.autograd.grad(losses["vb"].sum(), output)
    assert (grad[:, :1] == 0).all() and (grad[:, 1:] != 0).all()


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_plain_mse_differs_by_the_documented_weight(prediction):
    t = torch.tensor([0, 3, 50, 99])
    x0, noise, guess = _batch(4, 2, 3, 3)

    def losses(loss_weighting, variance="fixed_small"):
        d = Diffusion("linear", 100, prediction, False, variance, loss_weighting)
        x_t = d.q_sample(x0, t, noise)
        x0_guess = (x_t - (1 - d.alpha_bar[t]).sqrt().reshape(4, 1, 1, 1) * guess) / d.alpha_bar[
            t
        ].sqrt().reshape(4, 1, 1, 1)
        output = d.target(x0_guess, guess, t)
        return d, d.training_losses(_constant_model(output), x0, t, noise=noise), output, x_t

    noise_mse = (noise - guess).square().mean((1, 2, 3))
    d, plain, _, _ = losses("none")
    a = d.alpha_bar[t]
    weight = {"epsilon": 1 + 0 * a, "x0": a / (1 - a), "v": a, "score": 1 - a}[prediction]
    torch.testing.assert_close(weight * plain["mse"], noise_mse)
    torch.testing.assert_close(plain["loss"], plain["mse"])
    assert "vb" not in plain

    _, simple, _, _ = losses("epsilon")
    torch.testing.assert_close(simple["loss"], noise_mse)

    for variance in ("fixed_small", "fixed_large"):
        d, elbo, output, x_t = losses("elbo", variance)
        kl = d.vb_term(x0, x_t, t, d.reverse(output, x_t, t))[1:]
        sigma2 = d.reverse(output, x_t, t).log_variance[1:, 0, 0, 0].exp()
        small = d.q_posterior(x0, x_t, t)[1][1:].flatten()
        constant = (sigma2.log() - small.log() + small / sigma2 - 1) / 2 / math.log(2)
        torch.testing.assert_close(elbo["loss"][1:] + constant, kl)
        assert elbo["loss"][0] > 0


def test_half_precision_models_get_float32_losses():
    d = Diffusion()
    seen = []

    def model(x, t, y):
        seen.append((x.dtype, t.dtype, y))
        return torch.cat([x, x], 1).bfloat16()

    x0 = torch.randn(2, 1, 4, 4).bfloat16()
    losses = d.training_losses(model, x0, torch.tensor([0, 999], dtype=torch.int32))
    assert seen == [(torch.bfloat16, torch.int64, None)]
    assert {v.dtype for v in losses.values()} == {torch.float32}
    assert all(v.shape == (2,) and v.isfinite().all() for v in losses.values())


@pytest.mark.parametrize(
    "t, y, message",
    [
        (torch.tensor([1.0, 2.0]), None, "float32"),
        (torch.tensor([0, 1000]), None, r"\[0, 999\], got 0 … 1000"),
        (torch.tensor([-1, 3]), None, "got -1 … 3"),
        (torch.tensor([1]), None, r"shape \(2,\)"),
        (torch.tensor([1, 2]), torch.tensor([1, 2, 3]), r"\(3,\) for 2 images"),
    ],
)
def test_bad_timesteps_and_labels_are_named(t, y, message):
    d = Diffusion()
    x0 = torch.zeros(2, 1, 4, 4)
    with pytest.raises(ValueError, match=message):
        d.training_losses(_constant_model(torch.zeros(2, 2, 4, 4)), x0, t, y)


def test_images_that_are_not_scaled_are_named():
    x0 = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"floating point, in \[-1, 1\].*uint8"):
        Diffusion().training_losses(_constant_model(x0), x0, torch.tensor([1, 2]))


def test_channel_mismatch_names_both():
    x0, t = torch.zeros(2, 3, 4, 4), torch.tensor([1, 2])
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 4\).*learn_sigma=True.*6 channels"):
        Diffusion().training_losses(_constant_model(x0), x0, t)
    with pytest.raises(ValueError, match=r"learn_sigma=False.*3 channels"):
        output = torch.zeros(2, 6, 4, 4)
        Diffusion(learn_sigma=False).training_losses(_constant_model(output), x0, t)
    with pytest.raises(ValueError, match="differ in shape"):
        Diffusion().training_losses(_constant_model(x0), x0, t, noise=x0[:1])


# -- the variational bound ---------------------------------------------------------------------


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("learn_sigma", [True, False])
def test_bound_of_gaussian_data_in_closed_form(prediction, learn_sigma):
    """E KL = ½ (log σ²/β̃ + (β̃ + c² Var(x0 | x_t)) / σ² - 1), c the posterior's weight on x0."""
    d = Diffusion("linear", 30, prediction, learn_sigma, "fixed_large")
    x0 = MU + SCALE * _batch(2, 1, 110, 110)[0]
    g = torch.Generator().manual_seed(3)
    bound = d.variational_bound(GaussianDenoiser(d, -0.4), x0, generator=g)
    a, beta = d.alpha_bar[1:], d.betas[1:]
    before = d.alpha_bar[:-1]
    small = beta * (1 - before) / (1 - a)
    sigma2 = (0.3 * beta.log() + 0.7 * small.log()).exp() if learn_sigma else beta
    c = before.sqrt() * beta / (1 - a)
    uncertainty = SCALE**2 * (1 - a) / (a * SCALE**2 + 1 - a)
    kl = ((sigma2 / small).log() + (small + c**2 * uncertainty) / sigma2 - 1) / 2 / math.log(2)
    assert bound.timesteps[:, 0].tolist() == list(range(1, 30))
    torch.testing.assert_close(bound.terms, kl[:, None].expand(-1, 2), rtol=0.05, atol=0)

    last = d.alpha_bar[-1]
    prior = (last * (MU**2 + SCALE**2) - last - (1 - last).log()) / 2 / math.log(2)
    torch.testing.assert_close(bound.prior, prior.expand(2), rtol=0.05, atol=0)
    torch.testing.assert_close(bound.total, bound.prior + bound.terms.sum(0) + bound.decoder)
    assert (bound.standard_error == 0).all()


def test_decoder_term_of_the_bound():
    d = Diffusion("linear", 20, learn_sigma=False)
    x0 = torch.randint(256, (2, 1, 8, 8)).double() / 127.5 - 1
    model = GaussianDenoiser(d)
    bound = d.variational_bound(model, x0, generator=torch.Generator().manual_seed(5))
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(5), dtype=x0.dtype)
    t = torch.zeros(2, dtype=torch.int64)
    x_t = d.q_sample(x0, t, noise)
    x0_guess, _ = d.predict(model(x_t, t, None), x_t, t)
    variance = d.betas[1] * (1 - d.alpha_bar[0]) / (1 - d.alpha_bar[1])
    log_p = discretized_gaussian_log_likelihood(x0, x0_guess, variance.log().expand_as(x0))
    torch.testing.assert_close(bound.decoder, -log_p.mean((1, 2, 3)) / math.log(2))


def test_estimated_bound_is_unbiased_and_so_is_its_error():
    """400 copies of one image are 400 independent estimates."""
    d = Diffusion("linear", 80)
    model = GaussianDenoiser(d)
    image = MU + SCALE * torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    copies = image.expand(400, -1, -1, -1)
    whole = d.variational_bound(model, copies, generator=torch.Generator().manual_seed(1))
    part = d.variational_bound(
        model, copies, num_terms=16, generator=torch.Generator().manual_seed(2)
    )
    assert part.terms.shape == (16, 400)
    middle = (part.total - part.prior - part.decoder).double()
    truth = whole.terms.sum(0).mean().double()
    spread = middle.std()
    assert abs(middle.mean() - truth) < 4 * spread / 20
    assert spread / truth < 0.1
    assert part.standard_error.square().mean().sqrt() == pytest.approx(spread.item(), rel=0.15)
    torch.testing.assert_close(part.prior, whole.prior)


@pytest.mark.parametrize("steps, count", [(1000, 25), (200, 199), (11, 10), (11, 1), (200, 100)])
def test_strata_part_the_timesteps(steps, count):
    d = Diffusion("cosine", steps)
    timesteps = d.variational_bound(
        lambda x, t, y: torch.zeros(1, 2, 1, 1), torch.zeros(1, 1, 1, 1), num_terms=2 * count
    ).timesteps
    pairs = timesteps.reshape(count, 2).tolist()
    assert min(min(pairs)) >= 1 and max(max(pairs)) < steps
    for lower, upper in itertools.pairwise(pairs):
        assert max(lower) < min(upper)
    if count == steps - 1:
        assert pairs == [[t, t] for t in range(1, steps)]


@pytest.mark.parametrize("num_terms", [0, 3, 200])
def test_bad_number_of_terms_is_named(num_terms):
    d = Diffusion("linear", 100)
    with pytest.raises(ValueError, match=f"got {num_terms}"):
        d.variational_bound(GaussianDenoiser(d), torch.zeros(1, 1, 2, 2), num_terms=num_terms)


def test_bound_of_an_image_does_not_depend_on_the_batch():
    d = Diffusion("linear", 40)
    model = GaussianDenoiser(d)
    x0 = torch.randn(3, 1, 4, 4).clamp(-1, 1)

    def generators():
        return [torch.Generator().manual_seed(i) for i in range(3)]

    together = d.variational_bound(model, x0, num_terms=8, generator=generators())
    alone = d.variational_bound(model, x0[1:2], num_terms=8, generator=generators()[1:2])
    torch.testing.assert_close(alone.total, together.total[1:2])
    assert (together.timesteps[:, 0] != together.timesteps[:, 1]).any()


def test_single_step_process_has_a_bound():
    d = Diffusion(torch.tensor([0.5]))
    bound = d.variational_bound(GaussianDenoiser(d), torch.zeros(2, 1, 2, 2))
    torch.testing.assert_close(bound.total, bound.prior + bound.decoder)


def test_reverse_is_what_vb_term_reads():
    """A reverse distribution equal to the posterior has no divergence from it."""
    d = Diffusion()
    x0, x_t, _ = _batch(2, 1, 3, 3)
    t = torch.tensor([10, 900])
    mean, _, log_variance = d.q_posterior(x0, x_t, t)
    exact = Reverse(mean, log_variance.expand_as(mean), x0, x0)
    torch.testing.assert_close(d.vb_term(x0, x_t, t, exact), torch.zeros(2, dtype=torch.float64))

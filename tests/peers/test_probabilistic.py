"""Models of NumPyro and BlackJAX as their manuals show them: densities, ELBOs, sampler steps."""

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import SVI, Trace_ELBO, autoguide
from numpyro.infer.util import initialize_model

from compare import assert_same_gradient

KEY = jax.random.key(0)
EFFECTS = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
FLIPS = np.array([1.0, 1.0, 1.0, 0.0, 1.0, 0.0])


def eight_schools():
    mu, tau = numpyro.sample("mu", dist.Normal(0, 5)), numpyro.sample("tau", dist.HalfCauchy(5))
    with numpyro.plate("schools", 8):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("obs", dist.Normal(theta, ERRORS), obs=EFFECTS)


def coin():
    fairness = numpyro.sample("fairness", dist.Beta(10, 10))
    with numpyro.plate("flips", len(FLIPS)):
        numpyro.sample("obs", dist.Bernoulli(fairness), obs=FLIPS)


def logistic_regression():
    x = np.random.default_rng(0).standard_normal((9, 3))
    weights = numpyro.sample("weights", dist.Normal(np.zeros(3), np.ones(3)).to_event(1))
    with numpyro.plate("data", 9):
        numpyro.sample("obs", dist.Bernoulli(logits=x @ weights), obs=x[:, 0] > 0)


def mixture():
    weights = numpyro.sample("weights", dist.Dirichlet(np.ones(2)))
    means = numpyro.sample("means", dist.Normal(np.zeros(2), 2.0).to_event(1))
    scale = numpyro.sample("scale", dist.Gamma(2.0, 3.0))
    parts = dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(means, scale))
    with numpyro.plate("data", 6):
        numpyro.sample("obs", parts, obs=FLIPS)


def random_walk():
    cholesky = numpyro.sample("cholesky", dist.LKJCholesky(2, 1.5))
    walk = numpyro.sample("walk", dist.GaussianRandomWalk(0.3, num_steps=6))
    pairs = jnp.stack([walk, FLIPS], -1)
    with numpyro.plate("data", 6):
        numpyro.sample("obs", dist.MultivariateNormal(scale_tril=cholesky), obs=pairs)


@pytest.mark.parametrize("model", [eight_schools, coin, logistic_regression, mixture, random_walk])
def test_potential_energy(model):
    with jax.enable_x64(True):
        found = initialize_model(jax.random.PRNGKey(0), model)
        assert_same_gradient(found.potential_fn, found.param_info.z, "float64")


@pytest.mark.parametrize("model", [eight_schools, coin, mixture])
@pytest.mark.parametrize("guide", [autoguide.AutoNormal, autoguide.AutoMultivariateNormal])
def test_evidence_lower_bound(model, guide):
    with jax.enable_x64(True):
        guide = guide(model)
        svi = SVI(model, guide, numpyro.optim.Adam(0.1), Trace_ELBO(num_particles=2))
        params = svi.get_params(svi.init(jax.random.PRNGKey(0)))
        loss = lambda p: Trace_ELBO(2).loss(jax.random.PRNGKey(1), p, model, guide)
        assert_same_gradient(loss, params, "float64")


def location(position):
    """The quickstart's: a normal distribution of observed numbers."""
    normal = jax.scipy.stats.norm.logpdf(EFFECTS, position["loc"], jnp.exp(position["log_scale"]))
    return position["log_scale"] + jnp.sum(normal)


def sampled(sampler):
    """The density where a sampler arrives, whose steps take gradients of it themselves."""
    def density(start):
        state = sampler.init(start, KEY)
        for key in jax.random.split(KEY, 2):
            state, _ = sampler.step(key, state)
        return location(state.position)

    return density


def banana(position):
    x, y = position["loc"], position["log_scale"]
    return -0.5 * (x**2 + 100 * (y - x**2) ** 2)


def horseshoe(position):
    w, tau = position["loc"], jnp.exp(position["log_scale"])
    x = np.random.default_rng(0).standard_normal(5)
    prior = jax.scipy.stats.cauchy.logpdf(tau) + jax.scipy.stats.norm.logpdf(w, 0, tau)
    return prior + jnp.sum(jax.scipy.stats.bernoulli.logpmf(x > 0, jax.nn.sigmoid(w * x)))


DENSITIES = {
    "quickstart": location, "banana": banana, "horseshoe": horseshoe,
    "after HMC": sampled(blackjax.hmc(location, 0.1, np.ones(2), 3)),
    "after MALA": sampled(blackjax.mala(location, 0.01)),
    "after Langevin": sampled(blackjax.mclmc(location, 1.0, 0.1)),
}


@pytest.mark.parametrize("name", DENSITIES)
def test_blackjax(name):
    with jax.enable_x64(True):
        start = {"loc": jnp.array(1.0), "log_scale": jnp.array(0.5)}
        assert_same_gradient(DENSITIES[name], start, "float64")

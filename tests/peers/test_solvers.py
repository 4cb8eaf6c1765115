"""Differential equations, root finding and linear solves of other packages, as in their manuals."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import lineax
import numpy as np
import optimistix
import pytest

import fbprop

X = jnp.array([0.7, 1.3])
MATRIX = jnp.array([[3.0, 1.0], [1.0, 2.0]])


def decay(adjoint, solver=None):
    def solve(x):
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, rate: -rate * y + jnp.sin(t)), solver or diffrax.Heun(),
            0.0, 1.0, 0.1, x, 2 * x, max_steps=16, saveat=diffrax.SaveAt(ts=[0.3, 1.0]),
            adjoint=adjoint,
        )
        return jnp.sum(solution.ys**2)

    return solve


class Towards(eqx.Module):
    goal: jax.Array

    def __call__(self, t, y, args):
        return self.goal - y


def steady_state(x):
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(Towards(x)), diffrax.Tsit5(), 0.0, jnp.inf, None, jnp.ones(2),
        max_steps=None, stepsize_controller=diffrax.PIDController(rtol=1e-3, atol=1e-6),
        event=diffrax.Event(diffrax.steady_state_event()), adjoint=diffrax.ImplicitAdjoint(),
    )
    return jnp.sum(solution.ys**2)


def optimum(solve, fun, solver):
    return lambda x: jnp.sum(solve(fun, solver, jnp.ones(2), x).value ** 2)


def linear_solve(x):
    operator = lineax.MatrixLinearOperator(MATRIX * x)
    return jnp.sum(lineax.linear_solve(operator, jnp.array([1.0, 2.0])).value ** 2)


MODELS = {
    "diffrax, direct": decay(diffrax.DirectAdjoint()),
    "diffrax, checkpoints": decay(diffrax.RecursiveCheckpointAdjoint()),
    "diffrax, backsolve": decay(diffrax.BacksolveAdjoint()),
    "diffrax, implicit": steady_state,
    "optimistix, root": optimum(
        optimistix.root_find, lambda y, x: jnp.tanh(y * x) - 0.3 + y, optimistix.Newton(1e-8, 1e-8)
    ),
    "optimistix, minimum": optimum(
        optimistix.minimise, lambda y, x: jnp.sum((y * x - 1) ** 2 + y**4),
        optimistix.BFGS(1e-8, 1e-8),
    ),
    "optimistix, fixed point": optimum(
        optimistix.fixed_point, lambda y, x: jnp.cos(y * x) / 2,
        optimistix.FixedPointIteration(1e-8, 1e-8),
    ),
    "lineax": linear_solve,
    "lineax, batch": lambda x: jnp.sum(jax.vmap(linear_solve)(jnp.stack([x, 2 * x]))),
}


@pytest.mark.parametrize("name", MODELS)
def test_solvers(name):
    with jax.enable_x64(True):
        x = X.astype(jnp.float64)
        both = lambda x: [g(MODELS[name])(x) for g in (jax.value_and_grad, fbprop.value_and_grad)]
        (value, expected), (got_value, got) = jax.jit(both)(x)
        assert np.abs(expected).max() > 0
        np.testing.assert_allclose(got_value, value, rtol=1e-12)
        np.testing.assert_allclose(got, expected, rtol=1e-9)

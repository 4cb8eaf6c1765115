"""What learning rules say of bad input."""

import jax
import jax.numpy as jnp
import pytest

from fbprop import learning

KEY = jax.random.key(0)
PARAMS = {"encoder": {"w": jnp.ones((3, 3))}, "head": {"w": jnp.ones((3, 2))}}
X = jnp.ones((4, 3))
FED, OWN = learning.feedback_alignment(), learning.backprop()


def loss(params, x):
    return jnp.sum(jnp.tanh(x @ params["encoder"]["w"]) @ params["head"]["w"])


@pytest.mark.parametrize(("rules", "match"), [
    ({"encode/*": FED, "*": OWN}, r"got 'encode/\*', which matches none.*nearest.*encoder/w"),
    ({"*": FED, "head/*": OWN}, r"one learning rule, got 'head/\*' after '\*'"),
    ({"head/*": FED}, r"got 'encoder/w', which no pattern matches: add '\*'"),
])
def test_patterns(rules, match):
    with pytest.raises(ValueError, match=match):
        learning.by_path(rules).init(KEY, loss, PARAMS, X)


@pytest.mark.parametrize("rules", [{}, None, [("*", FED)]])
def test_rules_are_a_dict(rules):
    with pytest.raises(TypeError, match="Learning rules are a dict"):
        learning.by_path(rules)


def test_a_rule_is_a_method():
    with pytest.raises(TypeError, match=r"learning\.Method, got function"):
        learning.by_path({"*": loss})
    with pytest.raises(TypeError, match=r"learning\.Method, got dict"):
        learning.alignment({}, loss)


def test_rules_are_a_table():
    with pytest.raises(TypeError, match="rules is a table, got dict"):
        FED.value_and_grad(loss, rules={})(PARAMS, X, memory={})


def test_numbers():
    with pytest.raises(ValueError, match="three forms, got 'random'"):
        learning.sign_symmetry("random")
    with pytest.raises(ValueError, match="got decay=1.5 expected 0 <= decay < 1"):
        learning.kolen_pollack(1.5)


def test_shares():
    with pytest.raises(ValueError, match="a share, got rate=0 expected"):
        learning.weight_mirror(0)
    with pytest.raises(ValueError, match="between 0 and 1, got share=2"):
        learning.blend(FED, 2)


def small(params, x):
    return jnp.sum(x @ params["w"])


@pytest.mark.parametrize("method", [FED, learning.by_path({"*": FED})])
def test_another_networks_memory(method):
    memory = method.init(KEY, loss, PARAMS, X)
    with pytest.raises(ValueError, match="belongs to one network, got one of 'head/w'.*no such"):
        method.value_and_grad(small)({"w": PARAMS["head"]["w"]}, X, memory=memory)
    wide = {"encoder": PARAMS["encoder"], "head": {"w": jnp.ones((3, 5))}}
    with pytest.raises(ValueError, match=r"'head/w' with \['float32\[3, 2\]'\] expected"):
        method.value_and_grad(loss)(wide, X, memory=memory)
    first = lambda p, x: jnp.sum(x @ p["encoder"]["w"] + jnp.sum(x @ p["head"]["w"]))
    other = method.init(KEY, first, PARAMS, X)
    with pytest.raises(ValueError, match="got none for 'head/w', a weight here"):
        method.value_and_grad(loss)(PARAMS, X, memory=other)


def test_a_memory_of_another_kind():
    with pytest.raises(TypeError, match="got tuple expected a dict by path"):
        FED.value_and_grad(loss)(PARAMS, X, memory=())
    rules = learning.by_path({"head/*": FED, "*": OWN})
    for memory in (({},), {}):
        with pytest.raises(ValueError, match="a tuple with one part per pattern"):
            rules.value_and_grad(loss)(PARAMS, X, memory=memory)


def standardised(params, x):
    return jnp.sum(x @ jnp.exp(params["w"]))


def queried(params, x):
    return jnp.sum((x @ params["w"]) @ (params["w"].T @ params["w"]))


def custom(params, x):
    product = jax.custom_vjp(lambda x, w: jnp.tanh(x @ w))
    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, dy: (dy @ kept[1].T, kept[0].T @ dy))
    return jnp.sum(product(x, params["w"]))


@pytest.mark.parametrize(("network", "match"), [
    (standardised, r"got 'dot_general' \(at .*standardised.* none any more after 'exp' \(at"),
    (queried, r"data on its other side, got 'dot_general' \(at .*queried.*of two weights"),
    (custom, r"reaches the products inside a function, got 'custom_vjp_call'"),
])
def test_a_weight_that_is_not_known_as_such(network, match):
    params = {"w": jnp.ones((3, 2))}
    with pytest.raises(ValueError, match=match):
        FED.init(KEY, network, params, X)
    rules = learning.by_path({"*": OWN})
    rules.value_and_grad(network)(params, X, memory=rules.init(KEY, network, params, X))


def test_a_parameter_with_backpropagation_may_scale_a_weight():
    """Weight normalisation: the gain is no weight."""
    def normalised(params, x):
        return jnp.sum(((x + params["g"][:1]) @ (params["w"] * jnp.exp(params["g"]))) ** 2)

    params = {"w": jnp.ones((3, 2)), "g": jnp.zeros(2)}
    with pytest.raises(ValueError, match="after 'mul'|after 'exp'"):
        FED.init(KEY, normalised, params, X)
    rules = learning.by_path({"g": OWN, "*": FED})
    assert set(rules.init(KEY, normalised, params, X)[1]) == {"w"}

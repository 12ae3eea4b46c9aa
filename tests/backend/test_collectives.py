"""Bytes that programs send, in text of XLA modules and of programs of JAX."""

import json

import pytest

from keras_sd.backend.collectives import collective_bytes
from tests.programs import run_python

MODULE = """
HloModule jit_step, entry_computation_layout={(f32[8,4]{1,0})->f32[8,4]{1,0}}

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(f32[] %a, f32[] %b)
}

%body (state: (s32[], bf16[6])) -> (s32[], bf16[6]) {
  %inner = bf16[6]{0} all-reduce(bf16[6]{0} %x), replica_groups={{0,1}}, to_apply=%add
}

%unused (a: f32[9]) -> f32[9] {
  ROOT %never = f32[9]{0} all-reduce(f32[9]{0} %a), to_apply=%add
}

ENTRY %main (p: f32[8,4]) -> f32[8,4] {
  %loop = (s32[], bf16[6]) while(%i), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %both = (f32[8,4]{1,0:T(8,128)}, pred[3]{0}) all-reduce(%p, %q), replica_groups=[1,4]<=[4], to_apply=%add
  %begun = (f32[2,4]{1,0}, f32[8,4]{1,0}) all-gather-start(%r), replica_groups=[1,4]<=[4], dimensions={0}
  %ended = f32[8,4]{1,0} all-gather-done(%begun)
  %part = f32[2,4]{1,0} reduce-scatter(%p), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %last = f32[8,4]{1,0} copy(%ended)
}
"""


def test_whole_arrays_are_counted_as_often_as_they_are_sent():
    found = collective_bytes(MODULE)
    assert found == {
        "all-reduce": 5 * 6 * 2 + 8 * 4 * 4 + 3,
        "all-gather": 8 * 4 * 4,
        "reduce-scatter": 4 * 2 * 4 * 4,
    }


SENDING = """
import json
import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
import jax
from jax.sharding import NamedSharding, PartitionSpec as P
from keras_sd.backend.collectives import collective_bytes

mesh = jax.make_mesh((4,), ("batch",))
def on(shape, *axes):
    return jax.ShapeDtypeStruct(shape, "float32", sharding=NamedSharding(mesh, P(*axes)))

def gradient(weights, batch):
    return jax.grad(lambda w: ((batch @ w) ** 2).sum())(weights)

def sent(weights, out):
    jitted = jax.jit(gradient, out_shardings=NamedSharding(mesh, out))
    return collective_bytes(jitted.lower(weights, on((8, 32), "batch")).compile().as_text())

print(json.dumps([sent(on((32, 16)), P()), sent(on((32, 16), "batch"), P("batch"))]))
"""


@pytest.fixture(scope="module")
def sent():
    return json.loads(run_python(["-c", SENDING]))


def test_a_gradient_is_summed_once(sent):
    assert sent[0] == {"all-reduce": 32 * 16 * 4}


def test_sharded_weights_are_gathered(sent):
    assert sent[1]["all-gather"] == 32 * 16 * 4

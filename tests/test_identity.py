"""What makes two functions one."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import weakref

import pytest

from mixkvq.identity import Identity


def factory(inner, number=1.0, *, name="a"):
    def function(x, bound=number, *, word=name):
        return inner, x, bound, word

    return function


def base():
    pass


def other():
    pass


class Thing:
    def method(self):
        pass


THING = Thing()


@pytest.mark.parametrize(
    "make",
    [
        lambda: base,
        lambda: factory(base),
        lambda: factory(factory(base)),
        lambda: factory(THING),
        lambda: factory(base, 2.5, name="b"),
        lambda: functools.partial(factory(base), 1, word="c"),
        lambda: THING.method,
        lambda: functools.partial(THING.method),
    ],
)
def test_made_of_the_same_things(make):
    identity = Identity(make())
    gc.collect()
    assert identity.of(make()) and copy.deepcopy(identity).of(make())
    assert pickle.loads(pickle.dumps(identity)).of(make()) == (make() is base), (
        "only what can be imported is found again"
    )


@pytest.mark.parametrize(
    "one, another",
    [
        (base, other),
        (factory(base), factory(other)),
        (factory(base), factory(base, 2.0)),
        (factory(base, 1), factory(base, 1.0)),
        (factory(base), factory(base, name="b")),
        (factory(Thing()), factory(Thing())),
        (factory([]), factory([])),
        (functools.partial(base, 1), functools.partial(base, 2)),
        (functools.partial(base, a=1), functools.partial(base, b=1)),
        (Thing().method, Thing().method),
        (Thing(), Thing()),
        (base, functools.partial(base)),
        (len, max),
    ],
)
def test_made_of_different_things(one, another):
    assert Identity(one).of(one) and Identity(another).of(another)
    assert not Identity(one).of(another) and not Identity(another).of(one)


def test_nothing_is_kept_alive():
    thing = Thing()
    gone, identity = weakref.ref(thing), Identity(factory(factory(thing), [thing]))
    del thing
    gc.collect()
    assert gone() is None and not identity.of(factory(factory(Thing())))


def test_a_function_that_refers_to_itself():
    def make():
        def again():
            return again

        return again

    one, two = make(), make()
    assert Identity(one).of(one) and not Identity(one).of(two)

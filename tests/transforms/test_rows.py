"""Rows of a batch shared out among threads."""

import os
import subprocess
import sys
import textwrap
import threading

import pytest
import torch

from medcl.transforms import Compose, RandomBlur, RandomGamma, RandomNoise, RandomSpatial
from medcl.transforms.rows import _threads, by_rows

SIZE = (12, 14, 10)


@pytest.fixture
def threads():
    """Sets torch's threads for a while."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def chain():
    return Compose([
        RandomSpatial(20.0, (0.8, 1.2), flip=(0.5, 0.5, 0.5), p_elastic=0.5, p_affine=0.7), RandomNoise((0.0, 0.1)),
        RandomBlur((0.5, 1.0), probability=0.5), RandomGamma((0.7, 1.5)),
    ])  # fmt: skip


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("count", [2, 3, 8])
def test_every_form_of_a_chain_is_what_one_thread_gives(threads, batch, count):
    torch.manual_seed(batch)
    image, seeds = torch.randn(batch, 1, *SIZE), torch.arange(batch) + 7
    label, soft = (image > 0.5).to(torch.uint8), torch.rand(batch, 3, *SIZE)

    def all_forms():
        both = chain()
        params = both.draw(seeds, image.shape)
        return [both.apply(image, params), *both.apply_both(image, label, params),
                *both.apply_soft(image, soft, params)]  # fmt: skip

    threads(1)
    alone = all_forms()
    threads(count)
    together = all_forms()
    for a, b in zip(alone, together, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)  # gamma's means are summed in another order
    assert torch.equal(alone[2], together[2])  # labels
    assert not torch.equal(alone[0], image)


def test_each_thread_has_a_share_and_one_core(threads):
    _threads.cache_clear()  # what begins the threads belongs to this test
    threads(3)
    seen, all_at_once = [], threading.Barrier(3)

    def call(image, params):
        all_at_once.wait(10)
        seen.append((threading.get_ident(), torch.get_num_threads(), len(image)))
        return image + params[0]["shift"].reshape(-1, 1), image[:, :1]

    shift = torch.arange(7.0)
    moved, first = by_rows(call, (torch.ones(7, 2),), [{"shift": shift}])
    assert torch.equal(moved, (shift + 1)[:, None].expand(7, 2)) and torch.equal(first, torch.ones(7, 1))
    assert sorted(share for _, _, share in seen) == [1, 3, 3]
    assert len({ident for ident, _, _ in seen} - {threading.get_ident()}) == 3
    assert [cores for _, cores, _ in seen] == [1, 1, 1]
    assert torch.get_num_threads() == 3
    later = []  # a thread that begins after them has not been left with one core
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [3]


def test_few_rows_have_several_cores_each(threads):
    threads(5)
    seen = []
    by_rows(lambda image, params: seen.append(torch.get_num_threads()) or (image,), (torch.ones(2, 1),), [])
    assert seen == [2, 2] and torch.get_num_threads() == 5


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_caller_says_whether_gradients_are_kept(threads, mode):
    threads(2)
    weight = torch.ones(1, requires_grad=True)
    with mode():
        (out,) = by_rows(lambda image, params: (image * weight,), (torch.ones(4, 1),), [])
        assert out.requires_grad == torch.is_grad_enabled() and out.is_inference() == torch.is_inference_mode_enabled()


@pytest.mark.parametrize("low", [True, False])
def test_the_caller_says_whether_numbers_are_short(threads, low):
    threads(2)
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        (out,) = by_rows(lambda image, params: (image @ image,), (torch.ones(2, 3, 3),), [])
    assert out.dtype == (torch.bfloat16 if low else torch.float32)


def test_an_error_in_a_thread_reaches_the_caller(threads):
    threads(2)
    with pytest.raises(ZeroDivisionError):
        by_rows(lambda image, params: 1 // 0, (torch.ones(4, 1),), [])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_has_threads_of_its_own():
    """The parent's threads do not come along; waiting for them would never end."""
    program = """
        import os, signal, torch
        from medcl.transforms.rows import by_rows
        torch.set_num_threads(2)
        share = lambda: by_rows(lambda image, params: (image + 1,), (torch.zeros(4, 1),), [])[0]
        share()
        child = os.fork()
        if child == 0:
            signal.alarm(30)
            os._exit(0 if torch.equal(share(), torch.ones(4, 1)) else 1)
        raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, timeout=60)

"""A small finished study, shared by the tests of a process."""

from dataclasses import replace

import pytest

from divergence_lens.study import StudyConfig, run_study
from divergence_lens.study.presets import STUDENT
from tests.support.small_studies import copy_folder


@pytest.fixture(scope="session")
def config():
    # One model class is enough here; test_run.py covers both.
    return StudyConfig(
        backend="bridge",
        targets=("owl", "cat"),
        animals=("owl", "cat", "dog"),
        kinds=("finetuned",),
        conditions=("control", "all", "divergence_only"),
        prompts=30,
        seeds=(0,),
        held_out=6,
        pairs=0,
        student_recipe=replace(STUDENT, epochs=1),
    )


@pytest.fixture(scope="session")
def finished(tmp_path_factory, config):
    out = tmp_path_factory.mktemp("cells")
    run_study(config, out)
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory, finished):
    """A copy for each module: a second run rewrites the results of the first."""
    return copy_folder(finished, tmp_path_factory.mktemp("module") / "cells")

"""What a user names as settings to measure, and the runs each of them stands for."""

import os

import pytest

from noisycond.errors import InputError
from noisycond.evaluation.drawing import parse_subjects


def parsed(*words):
    return {subject.label: subject.members for subject in parse_subjects("--pipeline", words)}


def test_labels_and_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parsed("a=x,y", "owner/model", "b=z") == {"a": ("x", "y"), "owner/model": ("owner/model",), "b": ("z",)}


@pytest.mark.parametrize("name", ["a,b", "eta=0.1", "eta=0.1,0.2", "lr=1,a=2"])
def test_what_exists_is_one_folder_whatever_its_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    assert parsed(name) == {name: (name,)}
    assert parsed(f"label={name}") == {"label": (name,)}
    assert parsed(str(tmp_path / name)) == {name: (str(tmp_path / name),)}


@pytest.mark.parametrize("word", ["=x", "a=", "a=,", "x,y", ""])
def test_words_of_another_form(tmp_path, monkeypatch, word):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"--pipeline {word}: expected FOLDER, or LABEL=FOLDER,FOLDER"):
        parsed(word)


def test_a_run_twice_under_one_label_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    os.symlink("x", tmp_path / "link")
    with pytest.raises(InputError, match="--pipeline a=owner/m,owner/m: owner/m comes twice; name each run"):
        parsed("a=owner/m,owner/m")
    for other in ("./x", "x/", str(tmp_path / "x"), "link"):
        with pytest.raises(InputError, match=f"--pipeline a=x,{other}: {other} is x again; name each run"):
            parsed(f"a=x,{other}")
    assert parsed("a=x", "b=x") == {"a": ("x",), "b": ("x",)}


def test_a_label_twice_is_refused():
    with pytest.raises(InputError, match="two of them have the label 'a'"):
        parsed("a=x", "a=y")

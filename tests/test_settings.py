"""The settings of train.py: defaults, command line, checks, the run's name."""

import pytest

from common import InputError
from settings import Settings, parse_settings


def parse(text=""):
    return parse_settings(Settings, "train.py", "", text.split())


def test_settings_come_from_the_command_line():
    settings = parse("--head bilstm --no-clean --lr 1e-4 --gelu")
    assert settings == Settings(head="bilstm", clean=False, lr=1e-4, gelu=True)
    demo = parse("--demo --head bigru")
    assert (demo.out, demo.head, demo.model) == ("runs/demo", "bigru", "runs/demo/tiny_encoder")


@pytest.mark.parametrize(
    ("arguments", "folder"),
    [
        ("", "runs/roberta-large-entity"),
        ("--model runs/tapt/encoder", "runs/tapt-entity"),
        ("--model encoder", "runs/encoder-entity"),
        ("--out elsewhere --lr 1e-4", "elsewhere"),
        ("--folds 5", "runs/roberta-large-entity-folds=5-fold=0"),
        ("--folds 5 --fold 0", "runs/roberta-large-entity-folds=5-fold=0"),
        ("--folds 5 --fold 1", "runs/roberta-large-entity-folds=5-fold=1"),
        (
            "--head bilstm --no-clean --lr 1e-4 --gelu",
            "runs/roberta-large-bilstm-lr=0.0001-no_clean-gelu",
        ),
    ],
)
def test_the_run_folder_names_what_differs_from_the_defaults(arguments, folder):
    assert parse(arguments).folder().as_posix() == folder


def test_the_defaults():
    s = Settings()
    assert parse() == s
    assert (s.data, s.model, s.head) == ("data", "klue/roberta-large", "entity")
    assert (s.batch_size, s.epochs, s.beta2, s.weight_decay) == (64, 5, 0.98, 0.01)
    assert (s.warmup_ratio, s.clip_norm, s.seed, s.max_length) == (0.06, 1.0, 42, 256)
    assert (s.marker, s.prompt, s.type_names) == ("typed_entity_marker_punct", "s_and_o", "en")
    assert (s.split, s.norm, s.gelu, s.dropout) == ("test-like", "layer", False, 0)
    assert (s.lr, s.layer_decay, s.no_relation_share) == (None, None, None)


@pytest.mark.parametrize(
    ("hidden_size", "n_layers", "lr", "layer_decay"),
    [(1024, 24, 4e-5, 0.922), (768, 12, 7.1e-5, 0.85), (128, 2, 0.0026, 0.377)],
)
def test_learning_rate_and_decay_depend_on_the_encoder_unless_given(
    hidden_size, n_layers, lr, layer_decay
):
    resolved = Settings().resolve(hidden_size, n_layers)
    assert (resolved.lr, resolved.layer_decay) == (lr, layer_decay)
    given = Settings(lr=2e-5, layer_decay=1.0)
    assert given.resolve(hidden_size, n_layers) == given


@pytest.mark.parametrize(
    "arguments",
    [
        "--epochs 0",
        "--lr -1",
        "--lr 0",
        "--lr nan",
        "--max-length 10",
        "--label-smoothing 0.1 --focal-gamma 2",
        "--patience 2 --valid none",
        "--out .",
        "--folds 5 --fold 5",
        "--folds 1",
        "--fold 1",
        "--folds 5 --valid none",
        "--demo --model klue/bert-base",
        "--head mlp",
        "--unknown 1",
        "--epochs x",
    ],
)
def test_an_invalid_setting_is_an_error_that_names_it(arguments):
    with pytest.raises(InputError, match=f"{arguments.split()[0]}|{arguments.split()[-2]}"):
        parse(arguments)


def test_an_unknown_option_suggests_the_closest_one():
    expected = r"^unrecognized arguments: --batch_size 8; did you mean --batch-size\? train"
    with pytest.raises(InputError, match=expected):
        parse("--batch_size 8")


@pytest.mark.parametrize("given", ["--resume", "--resume_from_checkpoint x"])
def test_a_run_resumes_without_an_option(given):
    with pytest.raises(InputError, match=r"; the same command resumes by itself; train.py -h"):
        parse(given)

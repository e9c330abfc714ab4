"""Search space files: their meaning, and a message for each mistake."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sam3lora.config import load_config
from sam3lora.config.keys import known_keys
from sam3lora.errors import UserError
from sam3lora.tune.space.keys import NOT_SEARCHED
from sam3lora.tune.space.reader import load_space, space_names

WHOLE = """
base: light
set: {training.num_epochs: 10}
parameters:
  lora.alpha: {tied: 2 * lora.rank}
  lora.rank: {choice: [4, 8, 16, 32]}
  training.learning_rate: {loguniform: [2.0e-5, 1.0e-3]}
  lora.dropout: {uniform: [0.0, 0.2]}
  training.warmup_steps: {randint: [0, 200]}
  lora.target_modules: {choice: {few: [q_proj, v_proj], all: [q_proj, k_proj, v_proj, o_proj]}}
  components: {choice: [decoder, vision + mask decoder, mine]}
  training.seed: {grid: [1, 2]}
component_sets: {mine: [detr_decoder, mask_decoder]}
constraints: {max_trainable_parameters: 10_000_000, max_adapter_mb: 20}
search: {num_trials: 12, seed: 7, metric: cgf1, every_epochs: 2, max_concurrent: 3, held_out_split: null}
early_stopping: {scheduler: none, grace_epochs: 2, reduction_factor: 4}
failures: {retry_out_of_memory: false}
"""


@pytest.fixture
def whole(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(WHOLE)
    return file


def test_a_file_with_everything(whole):
    space = load_space(whole, overrides=["training.weight_decay=0.03", "training.num_epochs=12"])
    assert (space.name, space.base_name, space.num_trials) == ("mine", "light", 12)
    assert list(space.parameters)[:2] == ["lora.alpha", "lora.rank"]
    assert space.base.training.num_epochs == 12  # the command line over set
    assert space.base.training.weight_decay == 0.03
    assert (space.search.metric, space.search.mode, space.search.seed) == ("cgf1", "max", 7)
    assert space.constraints.parameter_limit == 5_000_000  # 20 MB at 4 bytes is the tighter bound
    assert space.early_stopping.scheduler == "none"
    assert not space.failures.retry_out_of_memory


def test_options_replace_the_file(whole):
    space = load_space(whole, config="quick_test", num_trials=3, metric="valid_loss", max_concurrent=1)
    assert (space.base.model.name, space.base.training.num_epochs) == ("tiny", 10)
    assert (space.num_trials, space.search.metric, space.search.mode) == (3, "valid_loss", "min")
    assert space.search.max_concurrent == 1


def test_the_written_space_stands_alone_and_differences_are_named(whole, tmp_path):
    space = load_space(whole)
    copy = tmp_path / "space.yaml"
    copy.write_text(load_space(whole, overrides=["training.weight_decay=0.03"]).to_yaml())
    again = load_space(copy)
    assert again == load_space(whole, overrides=["training.weight_decay=0.03"])
    assert space.differences(load_space(whole, num_trials=40, max_concurrent=9)) == []  # trials may grow
    assert space.differences(load_space(copy, metric="map")) == [
        "base.training.weight_decay: 0.01 here, 0.03 there",
        "search.metric: cgf1 here, map there",
    ]


def test_config_of_sets_values_and_all_component_flags(whole):
    space = load_space(whole)
    values = {"lora.rank": 4, "components": "vision + mask decoder", "lora.target_modules": ["q_proj"]}
    config = space.config_of(space.complete(values))
    assert config.lora.components == ("vision_encoder", "mask_decoder")
    assert (config.lora.rank, config.lora.alpha, config.lora.target_modules) == (4, 8, ("q_proj",))
    assert config.training == space.base.training
    assert space.config_of(space.base_values()) == space.base  # no trial leaves anything behind


def test_the_base_values_give_the_base(whole, space_of):
    space = load_space(whole)
    values = space.base_values()
    assert space.config_of(values) == space.base
    assert values["components"] == "detr + mask decoder"
    assert list(values) == list(space.parameters)
    key = "training.component_learning_rates.detr_decoder"  # absent in the base, and stays so
    space = space_of({key: {"loguniform": [1e-4, 1e-2]}, "lora.vision_last_layers": {"choice": [1, 2]}})
    assert space.base_values() == {key: None, "lora.vision_last_layers": None}
    assert space.config_of(space.base_values()) == space.base
    assert space.config_of({key: 1e-3}).training.component_learning_rates == {"detr_decoder": 1e-3}


def test_tied_values_follow_each_other_and_take_the_type_of_their_key(space_of):
    space = space_of(
        {
            "training.warmup_steps": {"tied": "lora.alpha / 3"},  # whole number: rounded
            "lora.alpha": {"tied": "lora.rank * 2"},
            "lora.rank": {"choice": [4, 5]},
            "training.gradient_accumulation_steps": {"tied": "max(1, 4 // training.batch_size)"},
        }
    )
    values = space.complete({"lora.rank": 4})
    assert values == {
        "training.warmup_steps": 3,
        "lora.alpha": 8.0,
        "lora.rank": 4,
        "training.gradient_accumulation_steps": 2,
    }
    assert type(values["training.warmup_steps"]) is int


@pytest.mark.parametrize(
    ("metric", "every", "best"), [("map", 3, "map"), ("cgf1", 3, "cgf1"), ("valid_loss", 0, "valid_loss")]
)
def test_a_trial_chooses_its_best_by_the_metric(space_of, metric, every, best):
    space = space_of(search={"metric": metric, "every_epochs": 3})
    config = space.trial_config({"lora.rank": 4}, "sweep/trials/0001")
    assert (config.evaluation.every_epochs, config.evaluation.best_metric) == (every, best)
    assert (config.output.output_dir, config.lora.rank) == ("sweep/trials/0001", 4)
    assert (config.training.save_total_limit, config.training.eval_steps) == (1, None)
    assert (config.logging.progress, config.logging.plots) == ("off", False)
    assert (config.evaluation.base_loss, config.training.frame_cache) == (False, True)


def test_trials_are_counted_with_the_base(space_of):
    grid = {"lora.rank": {"choice": [4, 8]}, "training.seed": {"grid": [1, 2, 3]}}
    assert space_of(grid, search={"algorithm": "grid"}).num_trials == 7  # the base has seed 42
    with_base = {"lora.rank": {"choice": [4, 8]}, "lora.alpha": {"tied": "2 * lora.rank"}}
    assert space_of(with_base, search={"algorithm": "grid"}).num_trials == 2
    with_base["lora.alpha"] = {"tied": "3 * lora.rank"}  # the base has rank 8, and alpha 16
    assert space_of(with_base, search={"algorithm": "grid"}).num_trials == 3
    assert space_of(grid, search={"algorithm": "grid", "include_base": False}).num_trials == 6
    assert space_of(grid, search={"algorithm": "grid", "num_trials": 5}).num_trials == 5
    assert space_of({"lora.dropout": {"uniform": [0, 0.5]}}).num_trials == 12
    assert space_of().num_trials == 3  # random, but there are no more than three ranks


def test_set_takes_sections_and_keeps_their_other_keys(space_of):
    changes = {"training": {"num_epochs": 7, "loss": {"mask": 3}}, "data.prompts": {"a b": "c"}}
    base = space_of(set=changes).base
    assert (base.training.num_epochs, base.training.loss.mask, base.data.prompts) == (7, 3, {"a b": "c"})
    assert base.training.learning_rate == load_config("quick_test").training.learning_rate


def test_a_base_beside_the_file_is_found(tmp_path):
    (tmp_path / "own.yaml").write_text(load_config("quick_test", ["lora.rank=3"]).to_yaml())
    file = tmp_path / "space.yaml"
    file.write_text("base: own.yaml\nparameters: {lora.rank: {choice: [1, 2]}}")
    space = load_space(file)
    assert (space.base.lora.rank, space.base_name) == (3, "own")


def test_a_value_that_needs_another_parameter_is_no_mistake():
    # vision_last_layers is refused beside the base, which freezes the vision encoder, but not beside every sample.
    parameters = {"lora.vision_last_layers": {"choice": [2, 4]}, "components": {"choice": ["decoder", "vision"]}}
    load_space({"base": "light", "parameters": parameters})


GOOD = "base: light\nparameters: {lora.rank: {choice: [4, 8]}}\n"
# A mistake for each rule -> the key that the message names, and what tells the rule. `test_parameters` has the rules of
# a single parameter, the tests of configurations those of values.
BAD_FILES = {
    "- base": ("base:", "expected keys"),
    "base: light": ("parameters", "empty"),
    "parameters: {lora.rank: {choice: [4]}}": ("base", "missing"),
    "base: ligth\nparameters: {lora.rank: {choice: [4]}}": ("base", 'did you mean "light"'),
    "base: light\nparameters: [lora.rank]": ("parameters", "keys with values"),
    "base: light\nsearch: {seed: 1": ("line 2, column 17", "not valid YAML"),
    "base: light\nset: {lora.apply_to_scoring: true}\nparameters: {components: {choice: [detr]}}": (
        "scoring",
        "keep one",
    ),
    "base: light\nsearch: {algorithm: grid}\nparameters: {lora.dropout: {uniform: [0, 0.1]}}": (
        "lora.dropout",
        "uniform",
    ),
    "base: light\nparameters: &p {lora.rank: {choice: [*p]}}": ("parameters.lora.rank.choice.0", "nested more than 20"),
    "&a [*a]": ("0.0", "nested more than 20"),
    f"base: {300 * 'x'}\nparameters: {{lora.rank: {{choice: [4]}}}}": ("base", "File name too long"),
    "base: ~no-such-user/x.yaml\nparameters: {lora.rank: {choice: [4]}}": ("base", "cannot be read"),
}
BAD_PARAMETERS = {
    "lora.ranks: {choice: [4]}": ("parameters.lora.ranks", "did you mean lora.rank?"),
    "lora: {choice: [4]}": ("parameters.lora", "is a section"),
    "lora.rank: {choice: []}": ("parameters.lora.rank", "choice is empty"),
    "lora.rank: {choice: [0, 4]}": ("parameters.lora.rank", "0 is refused"),
    "lora.dropout: {uniform: [0, 1]}": ("parameters.lora.dropout", "1 is refused"),
    "lora.rank: {uniform: [4, 8]}": ("parameters.lora.rank", "write randint"),
    "lora.use_dora: {randint: [0, 1]}": ("parameters.lora.use_dora", "holds no number"),
    "lora.rank: {choice: [4]}, lora.use_dora: {tied: lora.rank}": ("parameters.lora.use_dora", "cannot be tied"),
    "lora.rank: {choice: [4]}, lora.alpha: {tied: lora.rnk}": ("parameters.lora.alpha", "did you mean lora.rank?"),
    "lora.rank: {choice: [4]}, lora.alpha: {tied: training.lr_scheduler}": ("lora.alpha", "expected a number"),
    "lora.rank: {choice: [4]}, lora.alpha: {tied: 0 * lora.rank}": ("lora.alpha", "every combination is refused"),
    "lora.alpha: {tied: 2 * lora.rank}": ("parameters", "all tied"),
    "lora.alpha: {tied: 2 * lora.rank}, lora.rank: {tied: lora.alpha / 2}": ("lora.alpha", "circle"),
    "components: {choice: [decoderr]}": ("parameters.components", "neither a component nor a set"),
    "components: {choice: [1]}": ("parameters.components", "expected names"),
    "components: {uniform: [0, 1]}": ("parameters.components", "expected {choice: [...]}"),
    "components: {choice: [detr]}, lora.apply_to_scoring: {choice: [true]}": ("lora.apply_to_scoring", "keep one"),
    "lora.rank.x: {randint: [1, 4]}": ("parameters.lora.rank.x", "did you mean lora.rank?"),
    "lora.alpha: {choice: [2.0, .nan]}": ("parameters.lora.alpha.choice.1", "finite"),
    "lora.rank: {choice: [2020-01-01]}": ("parameters.lora.rank.choice.0", "is a date"),
    f"lora.alpha: {{uniform: [1, 1{400 * '0'}]}}": ("parameters.lora.alpha.uniform.1", "too large"),
    f"{201 * 'x'}: {{choice: [4]}}": ("xxx...", "at most 200 characters"),
}
BAD_KEYS = {
    "bases: light": ("bases", "did you mean base?"),
    "base: full": ("base", "written twice"),
    "set: {lora.ranks: 3}": ("lora.ranks", "did you mean lora.rank?"),
    "set: {lora.rank: 4}": ("lora.rank", "fixed by set"),
    "component_sets: {a: [decoder]}": ('component_sets."a"', '"decoder" is not a component of'),
    "component_sets: {detr: [scoring]}": ('component_sets."detr"', "built in"),
    "component_sets: {a + b: [scoring]}": ('component_sets."a + b"', "a + joins sets"),
    "component_sets: {a: []}": ('component_sets."a"', "empty"),
    "component_sets: {a: scoring}": ('component_sets."a"', "a list"),
    "search: {algoritm: grid}": ("search.algoritm", "did you mean search.algorithm?"),
    "search: {algorithm: bayes}": ("search.algorithm", "'bayes'"),
    "search: {num_trials: 1000000000000}": ("search.num_trials", "10000"),
    "search: {objective: quality_and_size}": ("search.objective", "optuna"),
    "constraints: {max_adapter_mb: 1.0e308}": ("constraints.max_adapter_mb", "finite"),
    "early_stopping: {reduction_factor: 1}": ("early_stopping.reduction_factor", "2"),
    "failures: {retry: true}": ("failures.retry", "unknown key"),
    "set: {training.seed: 2020-13-45}": ("bad.yaml", "not valid YAML"),
    "set: {data.prompts: {2020-01-01: x}}": ("set.data.prompts.2020-01-01", "a key is a text or number"),
    "name: ../../evil": ("name", "../../evil"),
    "name: [a]": ("name", "['a']"),
    "search: {held_out_split: valid}": ("search.held_out_split", "data.valid_split"),
    "search: {held_out_split: ..}": ("search.held_out_split", "name of a folder"),
}
BAD = BAD_FILES | {GOOD + line: words for line, words in BAD_KEYS.items()}
BAD |= {f"base: light\nparameters: {{{line}}}": words for line, words in BAD_PARAMETERS.items()}


@pytest.mark.parametrize(("text", "words"), BAD.items(), ids=range(len(BAD)))
def test_a_mistake_gets_one_message_that_names_its_key(tmp_path, text, words):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        load_space(file)
    message = str(caught.value)
    assert all(word in message for word in words)
    assert len(message) < 700
    assert "\n" not in message, "one mistake, one line"
    assert message.startswith(str(file))


def test_an_anchor_that_multiplies_is_refused_at_once(tmp_path):
    file = tmp_path / "bomb.yaml"
    levels = "".join(f"x{n}: &x{n} [{', '.join(10 * [f'*x{n - 1}'])}]\n" for n in range(1, 12))
    file.write_text(GOOD + f"x0: &x0 [1]\n{levels}")
    with pytest.raises(UserError, match="more than 100,000 values"):
        load_space(file)


@pytest.mark.parametrize("key", NOT_SEARCHED)
def test_what_is_the_same_for_all_trials_cannot_be_searched(key):
    inner = next((name for name in known_keys() if name.startswith(f"{key}.")), key)
    with pytest.raises(UserError, match=rf"parameters\.{inner}: cannot be searched"):
        load_space({"base": "light", "parameters": {inner: {"choice": [1, 2]}}})


@pytest.mark.parametrize("key", ["training.num_negatives", "training.loss.mask", "model.resolution"])
def test_validation_losses_that_do_not_compare_are_refused(key):
    source = {"base": "quick_test", "parameters": {key: {"choice": [224, 112]}}, "search": {"metric": "valid_loss"}}
    with pytest.raises(UserError, match="choose metric map or cgf1 or bbox_map"):
        load_space(source)
    load_space(source, metric="map")


def test_validation_asks_the_same_whatever_the_seed(tmp_path):
    # Losses of trials with different seeds are means over the same queries; training draws others.
    from sam3lora.data.sample import record_queries
    from sam3lora.data.synth.dataset import write_dataset
    from sam3lora.training.datasets import load_run_data

    write_dataset(tmp_path, num_train=6, num_valid=6, size=112, progress=False)

    def asked(seed):
        overrides = [f"training.data_dir={tmp_path}", f"training.seed={seed}", "training.num_negatives=1"]
        data = load_run_data(load_config("quick_test", overrides), 224)
        splits = ((data.train, data.train_settings), (data.valid, data.valid_settings))
        return [[record_queries(record, how) for record in split.table.to_pylist()] for split, how in splits]

    (train, valid), (other_train, other_valid) = asked(1), asked(2)
    assert valid == other_valid
    assert train != other_train


def test_a_held_out_split_is_another_folder(tmp_path):
    (tmp_path / "valid").mkdir()
    (tmp_path / "copy").symlink_to(tmp_path / "valid")
    file = tmp_path / "space.yaml"
    file.write_text(GOOD + "search: {held_out_split: copy}")
    assert load_space(file).search.held_out_split == "copy"  # no data yet
    with pytest.raises(UserError, match=r"copy is the folder of data\.valid_split"):
        load_space(file, overrides=[f"training.data_dir={tmp_path}"])
    # The default gives way, so that a data set without a third split needs no file of its own.
    assert load_space("lora_quick").search.held_out_split == "test"
    assert load_space("lora_quick", overrides=["data.valid_split=test"]).search.held_out_split is None


def test_a_grid_is_bounded(space_of):
    many = {key: {"grid": list(range(1, 60))} for key in ("lora.rank", "lora.alpha", "training.warmup_steps")}
    with pytest.raises(UserError, match=r"205,379 combinations, expected at most 10,000.* search with random"):
        space_of(many, search={"algorithm": "grid"})
    assert space_of(many).num_trials == 12


def test_what_changes_no_result_may_differ(space_of):
    here = space_of(name="a", set={"training": {"num_workers": 1}})
    same = {"cache_dir": "x", "cache_gb": 3, "frame_cache": True, "feature_cache": False, "num_workers": 4}
    same |= {"logging_steps": 3, "save_steps": 7, "save_total_limit": 2, "gradient_checkpointing": True}
    assert here.differences(space_of(name="b", set={"training": same, "evaluation.base_loss": False})) == []
    there = space_of({"lora.rank": {"choice": [4]}}, set={"training.batch_size": 3}, constraints={"max_adapter_mb": 9})
    assert {line.partition(":")[0] for line in here.differences(there)} == {
        "base.training.batch_size",
        "parameters.lora.rank",
        "constraints.max_adapter_mb",
    }


def test_all_problems_are_listed_together(tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_text("base: lite\nparameters: {lora.rank: {choice: []}, lora.x: {choice: [1]}}\nsearch: {seed: -1}\n")
    with pytest.raises(UserError) as caught:
        load_space(file)
    problems = str(caught.value).splitlines()[1:]
    assert [line.split()[0].rstrip(":") for line in problems] == [
        "parameters.lora.rank", "parameters.lora.x", "base", "search.seed",
    ]  # fmt: skip
    file.write_text(GOOD + "".join(f"x{number}: 1\n" for number in range(50)))
    with pytest.raises(UserError, match=r"has 50 problems:(\n .*){20}\n  and 30 more$"):
        load_space(file)


def test_an_unknown_space_names_the_nearest_and_all_and_an_override_of_a_parameter_is_refused():
    with pytest.raises(UserError, match=r"lora\.rank is fixed by the command line and searched"):
        load_space("lora_quick", overrides=["lora.rank=4"])
    with pytest.raises(UserError) as caught:
        load_space("lora_quik")
    assert 'did you mean "lora_quick"?' in str(caught.value)
    assert all(name in str(caught.value) for name in space_names())


def test_reading_a_space_imports_nothing_heavy():
    code = "import sys; from sam3lora.tune.space.reader import load_space; load_space('lora_quick'); "
    code += "sys.exit(', '.join({'torch', 'ray', 'pandas', 'transformers', 'optuna'} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

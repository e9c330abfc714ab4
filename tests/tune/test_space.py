"""A search space file: what it means, and every way to get it wrong."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sam3lora.config import load_config
from sam3lora.errors import UserError
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


def test_the_written_space_stands_alone(whole, tmp_path):
    space = load_space(whole, overrides=["training.weight_decay=0.03"])
    copy = tmp_path / "space.yaml"
    copy.write_text(space.to_yaml())
    again = load_space(copy)
    assert again == space
    assert again.differences(space) == []


def test_differences_are_named_and_trials_may_grow(whole):
    space = load_space(whole)
    assert space.differences(load_space(whole, num_trials=40, max_concurrent=9)) == []
    found = space.differences(load_space(whole, metric="map", overrides=["training.weight_decay=0.03"]))
    assert found == [
        "base.training.weight_decay: 0.01 here, 0.03 there",
        "search.metric: cgf1 here, map there",
    ]


def test_a_changed_parameter_is_a_difference(space_of):
    here, there = space_of(), space_of({"lora.rank": {"choice": [4, 8]}})
    assert here.differences(there) == ["parameters.lora.rank: choice: 4, 8, 16 here, choice: 4, 8 there"]


def test_config_of_sets_values_and_all_component_flags(whole):
    space = load_space(whole)
    values = {"lora.rank": 4, "components": "vision + mask decoder", "lora.target_modules": ["q_proj"]}
    config = space.config_of(space.complete(values))
    assert config.lora.components == ("vision_encoder", "mask_decoder")
    assert (config.lora.rank, config.lora.alpha, config.lora.target_modules) == (4, 8, ("q_proj",))
    assert config.training == space.base.training
    assert space.config_of(space.base_values()) == space.base  # no trial leaves anything behind


def test_the_base_values_give_the_base(whole):
    space = load_space(whole)
    values = space.base_values()
    assert space.config_of(values) == space.base
    assert values["components"] == "detr + mask decoder"
    assert list(values) == list(space.parameters)


def test_a_base_value_that_is_absent_stays_absent(space_of):
    key = "training.component_learning_rates.detr_decoder"
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


def test_labels(space_of):
    space = space_of({"lora.target_modules": {"choice": {"few": ["q_proj"]}}, "lora.dropout": {"uniform": [0, 1 / 2]}})
    assert space.label("lora.target_modules", ["q_proj"]) == "few"
    assert space.label("lora.dropout", 0.00012) == "1.2e-4"
    assert space.label("anything", None) == "none"


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
BAD_FILES = {
    "- base": "expected keys such as base: and parameters:",
    "base: light": "parameters is empty: name at least one",
    "parameters: {lora.rank: {choice: [4]}}": "base is missing: write a preset (balanced, ",
    "base: ligth\nparameters: {lora.rank: {choice: [4]}}": 'neither a preset nor a YAML file: did you mean "light"?',
    "base: light\nparameters: [lora.rank]": "parameters should hold keys with values, got lora.rank",
    "base: light\nsearch: {seed: 1": "line 2, column 17: not valid YAML",
}
BAD_PARAMETERS = {
    "lora.ranks: {choice: [4]}": "parameters.lora.ranks: unknown key; did you mean lora.rank?",
    "lora: {choice: [4]}": "parameters.lora: is a section; write one of its keys, such as lora.rank",
    "lora.rank: {choice: []}": "parameters.lora.rank: choice is empty",
    "lora.rank: {chioce: [4]}": '"chioce" is no kind of parameter; did you mean choice?',
    "lora.rank: {choice: [0, 4]}": "parameters.lora.rank: 0 is refused: lora.rank should be greater than or equal to 1",
    "lora.dropout: {uniform: [0, 1]}": "parameters.lora.dropout: 1 is refused: lora.dropout should be less than 1",
    "lora.dropout: {uniform: [0.2, 0.1]}": "parameters.lora.dropout: uniform needs low < high",
    "training.learning_rate: {loguniform: [0, 0.1]}": "parameters.training.learning_rate: loguniform needs low > 0",
    "lora.rank: {uniform: [4, 8]}": "is a whole number: write randint instead of uniform",
    "lora.use_dora: {randint: [0, 1]}": "lora.use_dora holds no number, so it cannot be randint: write choice",
    "lora.rank: {choice: [4]}, lora.use_dora: {tied: lora.rank}": "holds no number, so it cannot be tied",
    "lora.rank: {choice: [4]}, lora.alpha: {tied: lora.rnk}": "tied to lora.rnk: unknown key; did you mean lora.rank?",
    "lora.rank: {choice: [4]}, lora.alpha: {tied: 2 *}": "parameters.lora.alpha: '2 *' is not an expression",
    "lora.rank: {choice: [4]}, lora.alpha: {tied: training.lr_scheduler}": "is 'cosine', expected a number",
    "lora.rank: {choice: [4]}, lora.alpha: {tied: 0 * lora.rank}": "every combination is refused: lora.alpha should be",
    "lora.alpha: {tied: 2 * lora.rank}": "parameters are all tied, so there is nothing to search",
    "lora.alpha: {tied: 2 * lora.rank}, lora.rank: {tied: lora.alpha / 2}": "tied in a circle: lora.",
    "lora.alpha: {tied: lora.alpha + 1}": "tied in a circle: lora.alpha -> lora.alpha; give one of them values",
    "components: {choice: [decoderr]}": '"decoderr" is neither a component nor a set of them; sets are vision',
    "components: {uniform: [0, 1]}": "parameters.components: expected {choice: [...]}",
    "components: {choice: [detr]}, lora.apply_to_scoring: {choice: [true]}": "lora.apply_to_scoring is a parameter too",
    "training.data_dir: {choice: [a, b]}": "cannot be searched: every trial must be measured on the same data",
    "data.exhaustive: {choice: [true, false]}": "cannot be searched: it is a fact about the annotations",
    "model.name: {choice: [tiny]}": "cannot be searched: adapters of different base models",
    "output.output_dir: {choice: [a]}": "cannot be searched: each trial gets a folder",
    "logging.level: {choice: [INFO]}": "cannot be searched: it does not change what is learned",
    "scaling.num_workers: {choice: [1]}": "cannot be searched: it says what a trial runs on",
    "training.num_epochs: {choice: [1]}": "cannot be searched: all trials train equally long",
    "evaluation.nms_iou: {uniform: [0.1, 0.9]}": "cannot be searched: it changes how detections are measured",
    "data.prompts: {choice: [{}, {a: b}]}": "cannot be searched: it changes what every metric asks",
    "data.negative_prompts: {choice: [[a], [b]]}": "cannot be searched: it changes what every metric asks",
    "lora.rank.x: {randint: [1, 4]}": "parameters.lora.rank.x: unknown key; did you mean lora.rank?",
    "lora.alpha: {choice: [.inf, 2.0]}": "parameters.lora.alpha.choice.0 is inf, expected a finite number",
    "lora.alpha: {choice: [2.0, .nan]}": "parameters.lora.alpha.choice.1 is nan, expected a finite number",
    "lora.rank: {choice: [2020-01-01]}": "parameters.lora.rank.choice.0 is a date, expected a number, a text",
    f"lora.alpha: {{uniform: [1, 1{400 * '0'}]}}": "parameters.lora.alpha.uniform.1 is a whole number too large",
    f"lora.rank: {{choice: [4]}}, lora.alpha: {{tied: {100_000 * '-'}1}}": "100001 characters is too long",
    f"{201 * 'x'}: {{choice: [4]}}": "xxx...: a key is a text or number on one line of at most 200 characters",
    f"lora.rank: {{choice: {500 * 'x'}}}": "got 'xxxxx",
    f"training.seed: {{choice: {list(range(501))}}}": "choice has 501 values, expected at most 500",
    "components: {choice: [1]}": "expected names of component sets, got 1",
}
BAD_KEYS = {
    "bases: light": "bases: unknown key; did you mean base?",
    "base: full": 'line 3, column 1: not valid YAML: the key "base" is written twice',
    "set: {lora.ranks: 3}": "base: light: lora.ranks: unknown key; did you mean lora.rank?",
    "set: {lora.rank: 4}": "lora.rank is fixed by set and searched as the parameter lora.rank: keep one",
    "component_sets: {a: [decoder]}": '"decoder" is no component; they are vision_encoder',
    "component_sets: {detr: [scoring]}": 'component_sets."detr" is built in: choose another name',
    "component_sets: {a + b: [scoring]}": "a + joins sets: choose a name without it",
    "component_sets: {a: []}": 'component_sets."a" is empty',
    "component_sets: {a: scoring}": "should be a list of components, got 'scoring'",
    "search: 5": "search should hold keys with values, got 5",
    "search: {algoritm: grid}": "search.algoritm: unknown key; did you mean search.algorithm?",
    "search: {algorithm: bayes}": "search.algorithm should be 'random', 'grid' or 'optuna', got 'bayes'",
    "search: {metric: loss}": "search.metric should be 'valid_loss', 'map' or 'cgf1', got 'loss'",
    "search: {num_trials: 0}": "search.num_trials should be greater than or equal to 1, got 0",
    "search: {objective: quality_and_size}": "needs algorithm optuna, got random",
    "constraints: {max_adapter_mb: 0}": "constraints.max_adapter_mb should be greater than 0, got 0",
    "early_stopping: {reduction_factor: 1}": "early_stopping.reduction_factor should be greater than or equal to 2",
    "failures: {retry: true}": "failures.retry: unknown key; ",
    "set: {training.seed: 2020-01-01}": "set.training.seed is a date, expected a number",
    "set: {training.seed: !!binary aGk=}": "set.training.seed is a bytes, expected a number",
    "set: {training.seed: 2020-13-45}": "not valid YAML: month must be in 1..12",
    "set: {training.seed: !!bool x}": "not valid YAML: a !!tag does not suit its value",
    "set: {data.prompts: {2020-01-01: x}}": "set.data.prompts.2020-01-01: a key is a text or number",
    f"set: {{training.seed: {50 * '['}{50 * ']'}}}": "is nested more than 20 deep",
    "set: &p {training: *p}": "set.training holds itself by an anchor (&)",
    "search: {num_trials: 1000000000000}": "search.num_trials should be less than or equal to 10000",
    "constraints: {max_adapter_mb: 1.0e308}": "constraints.max_adapter_mb should be less than or equal to 1000000000",
    "name: ../../evil": "name should be a text that can name a folder, got '../../evil'",
    "name: [a]": "name should be a text that can name a folder, got ['a']",
    "name: ..": "name should be a text that can name a folder, got '..'",
    "search: {held_out_split: valid}": "held_out_split valid is the folder of data.valid_split",
    "search: {held_out_split: train}": "held_out_split train is the folder of data.train_split",
    "search: {held_out_split: ./valid}": "should be the name of a folder in training.data_dir, got ./valid",
    "search: {held_out_split: /etc}": "should be the name of a folder in training.data_dir, got /etc",
    "search: {held_out_split: ..}": "should be the name of a folder in training.data_dir, got ..",
}
BAD = BAD_FILES | {GOOD + line: words for line, words in BAD_KEYS.items()}
BAD |= {f"base: light\nparameters: {{{line}}}": words for line, words in BAD_PARAMETERS.items()}
BAD |= {
    "base: light\nset: {lora.apply_to_scoring: true}\nparameters: {components: {choice: [detr]}}": "keep one",
    "base: light\nsearch: {algorithm: grid}\nparameters: {lora.dropout: {uniform: [0, 0.1]}}": "uniform has no list of",
    "base: light\nparameters: &p {lora.rank: {choice: [*p]}}": "parameters.lora.rank.choice.0 holds itself by",
    "&a [*a]": "0 holds itself by an anchor",
    f"base: {300 * 'x'}\nparameters: {{lora.rank: {{choice: [4]}}}}": "cannot be read: [Errno 36] File name too long",
    "base: ~no-such-user/x.yaml\nparameters: {lora.rank: {choice: [4]}}": "base: ~no-such-user/x.yaml cannot be read",
}


@pytest.mark.parametrize(("text", "words"), BAD.items(), ids=range(len(BAD)))
def test_a_bad_space_gets_one_message(tmp_path, text, words):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        load_space(file)
    message = str(caught.value)
    assert words in message
    assert len(message) < 700
    assert "\n" not in message, "one mistake, one line"
    assert message.startswith(str(file))


@pytest.mark.parametrize("key", ["training.num_negatives", "training.loss.mask", "model.resolution"])
def test_validation_losses_that_do_not_compare_are_refused(key):
    source = {"base": "quick_test", "parameters": {key: {"choice": [224, 112]}}, "search": {"metric": "valid_loss"}}
    with pytest.raises(UserError, match="choose metric map or cgf1"):
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
    with pytest.raises(UserError, match=r"205,379 combinations, more than the 10,000 .* or search with random"):
        space_of(many, search={"algorithm": "grid"})
    assert space_of(many).num_trials == 12


def test_many_problems_are_cut(tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_text(GOOD + "".join(f"x{number}: 1\n" for number in range(50)))
    with pytest.raises(UserError, match=r"has 50 problems:(\n .*){20}\n  and 30 more$"):
        load_space(file)


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
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("has 4 problems:")
    assert [line.strip().split(":")[0] for line in lines[1:]] == [
        "parameters.lora.rank",
        "parameters.lora.x",
        "base",
        "search.seed should be greater than or equal to 0, got -1",
    ]


def test_an_override_of_a_parameter_is_refused():
    with pytest.raises(UserError, match=r"lora\.rank is fixed by the command line and searched"):
        load_space("lora_quick", overrides=["lora.rank=4"])


def test_an_unknown_space_names_the_nearest_and_all():
    with pytest.raises(UserError) as caught:
        load_space("lora_quik")
    assert 'did you mean "lora_quick"?' in str(caught.value)
    assert all(name in str(caught.value) for name in space_names())


def test_reading_a_space_imports_nothing_heavy():
    code = "import sys; from sam3lora.tune.space.reader import load_space; load_space('lora_quick'); "
    code += "sys.exit(', '.join({'torch', 'ray', 'pandas', 'transformers', 'optuna'} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

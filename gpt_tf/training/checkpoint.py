"""Checkpoints, and the exact way back to them.

A checkpoint holds every variable that decides the following steps, what was measured
so far, and the best weights where `patience` is to keep them. The position in the data
follows from the step. The functions take the `Run` whose state they save or restore.
"""

import logging

import numpy as np
import safetensors.numpy
import tf_keras as keras

from gpt_tf import artifacts
from gpt_tf.errors import DamagedFileError, InputError, TrainingDivergedError
from gpt_tf.parallel import data as strategies
from gpt_tf.parallel.mesh_gpt import MeshGPT
from gpt_tf.settings.configuration import differences

logger = logging.getLogger(__name__)

# What history.json holds.
HISTORY = {key: [{"step": int, str: float}] for key in ("steps", "validations")}


def state_of(run):
    """Return the arrays that decide the following steps, or refuse NaN and infinity."""
    # A mesh has some variables in other shapes than checkpoints have.
    is_mesh = isinstance(run.model, MeshGPT)
    state = {
        name: run.model.read_variable(v) if is_mesh else np.asarray(v.numpy())
        for name, v in _variables(run.model).items()
    }
    name = first_not_finite(state)
    if name is not None:
        raise diverged(run, f"NaN or infinity in {name}, after a loss of {run.loss},")
    return state


def save(run):
    """Write a checkpoint of this step, then remove those that are too many."""
    folder = _folder(run, run.step)
    if folder.exists():
        return
    state = state_of(run)  # by every worker, so that all of them stop
    if not run.is_chief:
        return
    for index, weight in enumerate(run.best_weights or ()):
        state[f"best/{index:04d}"] = np.asarray(weight)
    with artifacts.atomic_folder(folder) as temporary:
        safetensors.numpy.save_file(state, temporary / "state.safetensors")
        artifacts.write_json(temporary / "history.json", run.history)
        artifacts.write_manifest(
            temporary,
            "checkpoint",
            ["state.safetensors", "history.json"],
            step=run.step,
            best=run.best,
            config=run.trained.get_config(),
        )
    _remove_old(run)


def restore_newest(run):
    """Restore the newest checkpoint that is whole; all workers take the chief's."""
    strategies.on_chief(run.strategy, lambda: _restore_newest_whole(run))
    step = strategies.of_chief(run.strategy, run.step)
    if run.is_chief or not step:
        return
    folder = _folder(run, step)
    if not folder.is_dir():
        raise InputError(
            "This worker expects the checkpoint that the chief goes on from. "
            f"Received: no {folder}. Name a folder that all workers share."
        )
    _restore(run, folder)


def diverged(run, received):
    """Return the error to raise when numbers, `received`, are no longer finite."""
    kept = _kept(run)
    last = f"The last checkpoint, {kept[-1]}, stays as it is. " if kept else ""
    return TrainingDivergedError(
        "Training expects a finite loss and finite weights. Received: "
        f"{received} at step {run.step}: the run diverged. {last}Start again, "
        "with --overwrite, at a `learning_rate` below "
        f"{run.config.learning_rate:g} or with more `warmup_steps`."
    )


def first_not_finite(arrays):
    """Return the name of the first array that contains NaN or infinity, or None."""
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            return name
    return None


def _variables(model):
    """Return every variable that decides the following steps, by a stable name."""
    weights = getattr(model, "changing_weights", model.weights)
    named = {f"model/{index:04d}": v for index, v in enumerate(weights)}
    optimizer = model.optimizer
    if isinstance(optimizer, keras.mixed_precision.LossScaleOptimizer):
        if optimizer.dynamic:
            scale = optimizer._loss_scale
            named["scale/current"] = scale.current_loss_scale
            named["scale/counter"] = scale.counter
        optimizer = optimizer.inner_optimizer
    for index, variable in enumerate(optimizer.variables):
        named[f"optimizer/{index:04d}"] = variable
    return named


def _folder(run, step):
    return run.out / "checkpoints" / f"step-{step:08d}"


def _kept(run):
    return sorted((run.out / "checkpoints").glob("step-*"))


def _remove_old(run):
    for old in _kept(run)[: -run.config.keep_checkpoints]:
        artifacts.remove(old)


def _restore_newest_whole(run):
    folders = _kept(run)[::-1]
    if not folders:
        logger.info("no checkpoint was written yet: starting from step 0")
        return
    for folder in folders:
        try:
            _restore(run, folder)
        except DamagedFileError as error:
            logger.warning("skipping a damaged checkpoint: %s", error)
            continue
        logger.info("going on from step %d", run.step)
        if folder == folders[0]:  # a process may have been killed in this
            _remove_old(run)
        return
    raise DamagedFileError(
        f"None of the {len(folders)} checkpoints in {folders[0].parent} is "
        "whole. Start again with --overwrite."
    )


def _restore(run, folder):
    manifest = artifacts.check_manifest(folder, "checkpoint")
    shape = {
        "config": dict,
        "step": int,
        "best": {"loss": (float, None), "step": int, "waited": int},
    }
    artifacts.check_shape(manifest, shape, folder / artifacts.MANIFEST_NAME)
    try:
        state = safetensors.numpy.load_file(folder / "state.safetensors")
    except Exception as error:  # safetensors' and NumPy's own
        raise DamagedFileError(f"{folder} cannot be read: {error}.") from None
    is_mesh = isinstance(run.model, MeshGPT)
    variables = _variables(run.model)
    expected = {
        name: f"{v.dtype.name} {run.model.outer_shape(v) if is_mesh else v.shape}"
        for name, v in variables.items()
    }
    found = {
        name: f"{array.dtype} {array.shape}"
        for name, array in state.items()
        if name in expected
    }
    config = run.trained.get_config()
    wrong = differences(manifest["config"], config) or differences(found, expected)
    if wrong:
        raise InputError(
            f"The checkpoint in {folder} is of another shape: {wrong}. "
            "Resume the run that wrote it."
        )
    name = first_not_finite(state)
    if name is not None:
        raise DamagedFileError(
            f"The checkpoint in {folder} contains NaN or infinity in {name}: "
            "training had diverged. Start again with --overwrite and a lower "
            "`learning_rate`."
        )
    with run.strategy.scope():
        for name, variable in variables.items():
            if is_mesh:
                run.model.write_variable(variable, state[name])
            else:
                variable.assign(state[name])
    best = [state[name] for name in sorted(state) if name.startswith("best/")]
    run.best_weights = best or None
    run.best, run.step = manifest["best"], manifest["step"]
    run.history = artifacts.read_json(folder / "history.json", HISTORY)

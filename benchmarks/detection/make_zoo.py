"""Trains the zoo that detection is measured on: backdoored and clean models in equal numbers.

    python benchmarks/detection/make_zoo.py --data DIR --zoo DIR [--only TEXT] [--workers N] [--full]

DIR of the data holds cifar10.npz, gtsrb.npz, mnist.npz (keys x_train, y_train, x_test, y_test) and,
for --only tinyimagenet, tinyimagenet.tar; they are not part of this project. Each model becomes
NAME.safetensors beside NAME.json with what was measured; one that is there is skipped, so that an
interrupted run goes on where it stopped. Triggers that were trained as well are kept as
NAME.trigger.safetensors.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

import architectures
import images
import torch
from specs import Spec, adaptive_zoo, attacks_of, targets_of, tinyimagenet_zoo, zoo
from torch import nn
from training import LEARNED, train

from tacext import TacextError, load_state_dict, save_weights
from tacext.attacks import AllToOne, Attack

# Below these a model has not learned its task, or not its backdoor. Small transformers and networks
# without batch norm get no further than this on so few images.
FEWEST_ASR = 0.9
FEWEST_ACC = {"cifar10": 0.6, "gtsrb": 0.8, "mnist": 0.95, "tinyimagenet": 0.25}


@dataclasses.dataclass(frozen=True)
class Record:
    """What is known of a trained model.

    Attributes:
        targets: the poisoned classes.
        acc, asr: on test images; asr is the lowest of its attacks, 0 for a clean model.
        seconds: of the training.
    """

    spec: Spec
    targets: tuple[int, ...]
    acc: float
    asr: float
    seconds: float

    @property
    def usable(self) -> bool:
        """Whether the model counts: good enough, and clean or truly backdoored."""
        enough = self.spec.attack == "clean" or self.asr >= FEWEST_ASR
        return enough and self.acc >= FEWEST_ACC[self.spec.dataset]


def read_record(file: Path) -> Record:
    """Of NAME.json."""
    fields = json.loads(file.read_text(encoding="utf-8"))
    fields["spec"] = Spec(**fields["spec"])
    fields["targets"] = tuple(fields["targets"])
    return Record(**fields)


def load_model(spec: Spec, data: images.Data, folder: Path, full: bool = False) -> nn.Module:
    """The trained model, in evaluation mode."""
    model = architectures.build(spec.network, data.num_classes, data.channels, data.size, full)
    model.load_state_dict(load_state_dict(folder / f"{spec.name}.safetensors"))
    return model.eval()


def trigger_file(spec: Spec, folder: Path) -> Path:
    """Of a trigger that was trained beside the model."""
    return folder / f"{spec.name}.trigger.safetensors"


def load_attacks(spec: Spec, data: images.Data, folder: Path) -> tuple[Attack, ...]:
    """The attacks behind a trained model; none for a clean one.

    Raises:
        FileError: the trigger was trained, and its file is not there.
    """
    if spec.attack not in LEARNED:
        return attacks_of(spec, data.num_classes, data.channels, data.size)
    trigger = LEARNED[spec.attack](data.channels)
    trigger.load_state_dict(load_state_dict(trigger_file(spec, folder)))
    trigger.requires_grad_(False).eval()
    return (Attack(trigger, AllToOne(targets_of(spec, data.num_classes)[0])),)


def _make(spec: Spec, data_folder: Path, folder: Path, full: bool) -> Record:
    torch.set_num_threads(1)
    trained = train(spec, images.load(spec.dataset, data_folder), full)
    record = Record(
        spec, trained.targets, round(trained.acc, 4), round(trained.asr, 4), round(trained.seconds)
    )
    for attack in trained.attacks:
        if isinstance(attack.trigger, nn.Module):
            save_weights(attack.trigger, trigger_file(spec, folder))
    save_weights(trained.model, folder / f"{spec.name}.safetensors")
    text = json.dumps(dataclasses.asdict(record), indent=1)
    unfinished = folder / f"{spec.name}.json.part"
    unfinished.write_text(text + "\n", encoding="utf-8")
    unfinished.rename(folder / f"{spec.name}.json")
    return record


def main() -> None:
    """Trains what is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--zoo", type=Path, required=True, metavar="DIR")
    parser.add_argument("--only", default="", help="names that contain this text")
    parser.add_argument("--workers", type=int, default=2, help="models at a time, a thread each")
    parser.add_argument("--tinyimagenet", action="store_true", help="the 200-class models as well")
    parser.add_argument("--full", action="store_true", help="ResNet-18 and the like, more epochs")
    options = parser.parse_args()
    options.zoo.mkdir(parents=True, exist_ok=True)
    wanted = zoo() + adaptive_zoo() + (tinyimagenet_zoo() if options.tinyimagenet else [])
    wanted = [spec for spec in wanted if options.only in spec.name]
    missing = [spec for spec in wanted if not (options.zoo / f"{spec.name}.json").exists()]
    print(f"{len(wanted)} models, {len(wanted) - len(missing)} of them there", flush=True)
    begin = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, mp_context=context) as pool:
        runs = {
            pool.submit(_make, spec, options.data, options.zoo, options.full): spec
            for spec in missing
        }
        for done, run in enumerate(as_completed(runs), 1):
            try:
                record = run.result()
            except TacextError as error:  # a training that diverged is no reason to stop the others
                print(f"[{done}/{len(missing)}] {runs[run].name}: {error}", flush=True)
                continue
            note = "" if record.usable else ", not usable"
            print(
                f"[{done}/{len(missing)}, {time.perf_counter() - begin:.0f} s] {record.spec.name}: "
                f"ACC {record.acc:.3f}, ASR {record.asr:.3f}, {record.seconds:.0f} s{note}",
                flush=True,
            )


if __name__ == "__main__":
    main()

from . import attacks, ops, report
from .data import ImageSet
from .detection import NormTest
from .errors import DependencyError, FileError, HeadNotFoundError, InputError, TacextError
from .evaluation import Evaluation, evaluate
from .finetuning import FinetuneSettings
from .guard import Guard, GuardInfo, GuardOutput, GuardScorer
from .guard_judgement import Judgement, judge
from .guard_metrics import GuardMonitors
from .guard_monitor import GuardMonitor
from .images import load_images
from .latent_patch import LatentPatch, remove_latent_patch
from .latent_patch_fit import PatchSettings
from .margins import MarginMax, MarginQuantile
from .neurons import NeuronScores, score_neurons
from .normalisation import Normalized
from .ops import MinimalPerturbation, SolverSettings, Status
from .pruning import PruneSettings
from .relearning import Relearning, relearn
from .repair_result import Attempt, RepairResult
from .repairing import repair
from .scan_report import ScanReport, ScanTimings
from .scanning import scan
from .verdict import Evidence
from .weights import load_model, load_state_dict, save_weights

__version__: str
cmake_prefix_path: str

__all__ = [
    "Attempt",
    "DependencyError",
    "Evaluation",
    "Evidence",
    "FileError",
    "FinetuneSettings",
    "Guard",
    "GuardInfo",
    "GuardMonitor",
    "GuardMonitors",
    "GuardOutput",
    "GuardScorer",
    "HeadNotFoundError",
    "ImageSet",
    "InputError",
    "Judgement",
    "LatentPatch",
    "MarginMax",
    "MarginQuantile",
    "MinimalPerturbation",
    "NeuronScores",
    "NormTest",
    "Normalized",
    "PatchSettings",
    "PruneSettings",
    "Relearning",
    "RepairResult",
    "ScanReport",
    "ScanTimings",
    "SolverSettings",
    "Status",
    "TacextError",
    "__version__",
    "attacks",
    "cmake_prefix_path",
    "evaluate",
    "judge",
    "load_images",
    "load_model",
    "load_state_dict",
    "ops",
    "relearn",
    "remove_latent_patch",
    "repair",
    "report",
    "save_weights",
    "scan",
    "score_neurons",
]

"""A predictor trained again from live labels: when, from what, where it is kept, who decides."""

from tandem_router.quality.retraining.archive import FolderArchive, StoreArchive
from tandem_router.quality.retraining.lifecycle import Retraining

__all__ = ["FolderArchive", "Retraining", "StoreArchive"]

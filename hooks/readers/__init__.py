"""Data sets of chest films as studies, read one after another; one file a data set."""

from hooks.readers.dicom import read_dicom_folder
from hooks.readers.hf import from_dataset, to_dataset
from hooks.readers.images import read_images
from hooks.readers.iu_xray import read_iu_xray
from hooks.readers.layouts import LAYOUTS, collect_studies, detect_layout, read_studies
from hooks.readers.mimic import MimicConfig, read_mimic
from hooks.readers.ms_cxr import with_ms_cxr
from hooks.readers.ms_cxr_t import with_ms_cxr_t
from hooks.readers.openi import read_openi, read_openi_folder
from hooks.readers.padchest_gr import read_padchest_gr
from hooks.readers.sections import parse_report, split_report
from hooks.readers.survey import Survey, survey

__all__ = [
    "LAYOUTS",
    "MimicConfig",
    "Survey",
    "collect_studies",
    "detect_layout",
    "from_dataset",
    "parse_report",
    "read_dicom_folder",
    "read_images",
    "read_iu_xray",
    "read_mimic",
    "read_openi",
    "read_openi_folder",
    "read_padchest_gr",
    "read_studies",
    "split_report",
    "survey",
    "to_dataset",
    "with_ms_cxr",
    "with_ms_cxr_t",
]

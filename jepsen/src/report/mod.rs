//! A history and its verdicts as a page with pictures.

//! stub
use super::connections::Fault;
use ::postgres::Transaction;
pub(super) struct Adoption;
pub(super) fn set_aside(_: &mut Transaction<'_>) -> Result<Option<Adoption>, Fault> {
    Ok(None)
}
impl Adoption {
    pub(super) fn convert(self, _: &mut Transaction<'_>) -> Result<(), Fault> {
        Ok(())
    }
}

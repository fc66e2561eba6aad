//! What was measured, as a table on standard output.

/// The share of the best that counts as no less.
const NEARLY: f64 = 0.95;

/// One cell for each row and column; empty where nothing was measured.
pub struct Table {
    title: String,
    /// What the names of the rows are.
    setting: String,
    columns: Vec<String>,
    rows: Vec<(String, Vec<Option<Cell>>)>,
}

#[derive(Debug, Clone)]
pub struct Cell {
    pub per_second: f64,
    /// Printed beside it.
    pub note: String,
}

impl Table {
    pub fn new(title: &str, setting: &str, columns: Vec<String>) -> Table {
        Table {
            title: title.to_owned(),
            setting: setting.to_owned(),
            columns,
            rows: Vec::new(),
        }
    }

    pub fn row(&mut self, name: impl ToString, cells: Vec<Option<Cell>>) {
        self.rows.push((name.to_string(), cells));
    }

    /// The name of the first row that is within 5 % of the best in this column.
    fn enough(&self, column: usize) -> Option<&str> {
        let per_second =
            |cells: &[Option<Cell>]| cells[column].as_ref().map(|cell| cell.per_second);
        let measured = self.rows.iter().filter_map(|(_, cells)| per_second(cells));
        let best = measured.fold(0.0, f64::max);
        let is_enough = |cells: &[Option<Cell>]| per_second(cells) >= Some(best * NEARLY);
        let found = self.rows.iter().find(|(_, cells)| is_enough(cells));
        found.map(|(name, _)| name.as_str())
    }

    /// Prints it, if there is anything in it; with `is_choice`, also which row is enough for each
    /// column.
    pub fn print(&self, is_choice: bool) {
        let mut cells = self.rows.iter().flat_map(|(_, cells)| cells);
        if cells.all(Option::is_none) {
            return;
        }
        let line = |name: &str, texts: Vec<String>| {
            let texts: String = texts.iter().map(|text| format!("{text:>22}")).collect();
            println!("{name:>24}{texts}");
        };
        println!("\n{}\n", self.title);
        line(&self.setting, self.columns.clone());
        for (name, cells) in &self.rows {
            line(name, cells.iter().map(shown).collect());
        }
        if is_choice {
            let enough = (0..self.columns.len()).map(|column| self.enough(column));
            let enough = enough.map(|name| name.unwrap_or("-").to_owned()).collect();
            line("fewest within 5 %", enough);
        }
    }
}

fn shown(cell: &Option<Cell>) -> String {
    match cell {
        Some(Cell { per_second, note }) => format!("{}{note}", thousands(*per_second)),
        None => "-".to_owned(),
    }
}

/// A number as a human reads it: `12,345`.
pub fn thousands(number: f64) -> String {
    let digits = format!("{number:.0}");
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

//! Deliveries a second by a number of threads, as a picture.

use std::error::Error;
use std::path::Path;

use plotters::coord::combinators::BindKeyPoints;
use plotters::prelude::*;

const SIZE: (u32, u32) = (960, 540);
/// Told apart by everybody (Okabe and Ito's blue, vermilion and green).
const COLORS: [RGBColor; 3] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
];

pub struct Plot<'a> {
    pub title: &'a str,
    /// The setting, along the x axis.
    pub threads: &'a str,
    /// In the order of the legend.
    pub lines: Vec<Line>,
}

pub struct Line {
    pub name: String,
    /// Threads, and what they delivered a second.
    pub points: Vec<(f64, f64)>,
}

impl Plot<'_> {
    /// Writes it as SVG, if there is anything in it. Both axes are logarithmic: where twice the
    /// threads deliver twice as much, a line is straight.
    pub fn write(&self, path: &Path) -> Result<bool, Box<dyn Error>> {
        let points = || self.lines.iter().flat_map(|line| &line.points);
        let (mut threads, figures): (Vec<f64>, Vec<f64>) = points().copied().unzip();
        threads.sort_by(f64::total_cmp);
        threads.dedup();
        let (Some(first), Some(last)) = (threads.first(), threads.last()) else {
            return Ok(false);
        };
        let low = figures.iter().copied().fold(f64::INFINITY, f64::min);
        let high = figures.iter().copied().fold(low, f64::max);
        let xs = (first / 1.3..last * 1.3).log_scale();
        let ys = (low / 1.5..high * 1.5).log_scale();

        let area = SVGBackend::new(path, SIZE).into_drawing_area();
        area.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&area)
            .caption(self.title, ("sans-serif", 20))
            .margin(15)
            .x_label_area_size(50)
            .y_label_area_size(85)
            .build_cartesian_2d(xs.with_key_points(threads), ys)?;
        chart
            .configure_mesh()
            .x_desc(self.threads)
            .y_desc("delivered a second")
            .axis_desc_style(("sans-serif", 16))
            .label_style(("sans-serif", 14))
            .x_label_formatter(&|threads| format!("{threads:.0}"))
            .y_label_formatter(&|figure| super::table::thousands(*figure))
            .draw()?;
        for (index, line) in self.lines.iter().enumerate() {
            let color = COLORS[index % COLORS.len()];
            let points = line.points.iter().copied();
            chart
                .draw_series(LineSeries::new(points, color.stroke_width(2)).point_size(3))?
                .label(&line.name)
                .legend(move |(x, y)| {
                    PathElement::new([(x, y), (x + 20, y)], color.stroke_width(2))
                });
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::LowerRight)
            .label_font(("sans-serif", 14))
            .background_style(WHITE)
            .border_style(BLACK)
            .draw()?;
        area.present()?;
        Ok(true)
    }
}
